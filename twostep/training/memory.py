"""Metering the memory of a training without having that memory.

Code under a `Meter` runs on fake tensors, which have shapes but no values; the meter adds up the
bytes of the storages that live. What torch's kernels take inside themselves, and what the process
itself takes (about half a GiB), is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from twostep.training import device as devices

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What an operation may be told beside tensors, for its result to be known by it."""

_UNSURE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
"""Operations whose results, or arguments afterwards, are not told by shapes."""


@dataclass(frozen=True)
class _Layout:
    """How a fake tensor lies in a storage of its own."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Result:
    """What an operation returns.

    Attributes:
        made: tensors with storages of their own.
        is_tuple: whether they come as a tuple.
        written: instead: the place of the argument that it writes into and returns.
        viewed: instead: the place of the argument that it returns another view of.
    """

    made: tuple[_Layout, ...] = ()
    is_tuple: bool = False
    written: int | None = None
    viewed: int | None = None


class _Undescribed(Exception):
    """An argument on whose shape alone a result does not depend."""


class Meter(FakeTensorMode):
    """A context in which tensors have no values and their bytes are counted.

    Asked for the value of a tensor (`item`), it answers 1.

    Attributes:
        living: bytes of all storages that were made in the context and still live.
        peak: the most that `living` ever was; may be set back by the caller.
    """

    def __init__(self) -> None:
        """Start at zero bytes."""
        super().__init__()
        self.living = 0
        self.peak = 0
        self._known_storages: set[int] = set()
        self._known_results: dict[Hashable, _Result | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation on fake tensors and count the storages of its result."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        # A generator cannot advance where no numbers are drawn.
        without_generator = {
            key: None if key == "generator" else value for key, value in (kwargs or {}).items()
        }
        try:
            key = (
                func,
                torch.get_default_dtype(),
                torch.is_inference_mode_enabled(),
                *_described(args),
                *_described(without_generator),
            )
        except _Undescribed:
            key = None
        known = self._known_results.get(key) if key is not None else None
        if known is not None:
            return self._again(known, func, args, without_generator)
        result = super().__torch_dispatch__(func, types, args, without_generator)
        # While torch remembers which tensors it has converted, no module can be moved.
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        if key is not None and key not in self._known_results:
            self._known_results[key] = _result_of(func, args, result)
        return result

    def _again(self, known: _Result, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation returned for arguments of the same shapes."""
        if known.written is not None:
            return args[known.written]
        if known.viewed is not None:
            with in_kernel_invocation_manager(self):
                view = func(*args, **kwargs)
            return FakeTensor(self, view, args[known.viewed].fake_device)
        made = []
        for layout in known.made:
            with in_kernel_invocation_manager(self):
                meta = torch.empty_strided(
                    layout.size, layout.stride, dtype=layout.dtype, device="meta"
                )
            tensor = FakeTensor(self, meta, layout.device)
            self._count(tensor.untyped_storage())
            made.append(tensor)
        return tuple(made) if known.is_tuple else made[0]

    def __deepcopy__(self, memo: object) -> Meter:
        """Return the meter itself, because the weights of a copied network refer to it."""
        return self

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known_storages:
            return
        num_bytes = storage.nbytes()
        self._known_storages.add(key)
        self.living += num_bytes
        self.peak = max(self.peak, self.living)
        weakref.finalize(storage, self._release, key, num_bytes)

    def _release(self, key: int, num_bytes: int) -> None:
        self._known_storages.remove(key)
        self.living -= num_bytes


def _described(value: Any) -> Iterator[Any]:
    """Yield what the shape of a result depends on; raises _Undescribed for what it cannot tell."""
    if isinstance(value, FakeTensor):
        if value.constant is not None or value.layout != torch.strided:
            raise _Undescribed
        yield value.size()
        yield value.stride()
        yield value.storage_offset()
        yield value.dtype
        yield value.fake_device
    elif isinstance(value, (list, tuple)):
        yield len(value)
        for each in value:
            yield from _described(each)
    elif isinstance(value, dict):
        yield tuple(value)
        for each in value.values():
            yield from _described(each)
    elif value is None or isinstance(value, _PLAIN):
        # 1 and 1.0 are equal, and make tensors of different dtypes.
        yield type(value)
        yield value
    else:
        raise _Undescribed


def _result_of(func: Any, args: Any, result: Any) -> _Result | None:
    """Return what can be made again of a result, or None where that is not known."""
    if not isinstance(func, OpOverload) or _UNSURE & set(func.tags):
        return None
    tensors = [each for each in tree_leaves(args) if isinstance(each, FakeTensor)]
    if not tensors:
        return None
    for place, each in enumerate(args):
        if each is result:
            return _Result(written=place)
    if func._schema.is_mutable:
        return None
    if isinstance(result, FakeTensor):
        storage = result.untyped_storage()._cdata
        for place, each in enumerate(args):
            if isinstance(each, FakeTensor) and each.untyped_storage()._cdata == storage:
                return _Result(viewed=place)
    made = result if isinstance(result, tuple) else (result,)
    storages = {each.untyped_storage()._cdata for each in tensors}
    if not all(isinstance(each, FakeTensor) and _is_alone(each, storages) for each in made):
        return None
    layouts = [_Layout(each.size(), each.stride(), each.dtype, each.fake_device) for each in made]
    return _Result(tuple(layouts), isinstance(result, tuple))


def _is_alone(tensor: FakeTensor, storages: Collection[int]) -> bool:
    """Return whether a tensor has a storage of its own, and all of it."""
    storage = tensor.untyped_storage()
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    reach = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    is_whole = tensor.storage_offset() == 0 and storage.nbytes() == reach * tensor.itemsize
    return is_whole and tensor.constant is None and storage._cdata not in storages


def is_metered(tensor: Tensor) -> bool:
    """Tell whether a tensor has no values, as under a `Meter`."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def computing_off_cpu() -> Iterator[None]:
    """Let fake tensors on the CPU take the memory that they would take on an accelerator.

    There bfloat16 is computed, whatever this CPU can do, attention is fused, and norms under
    autocast compute in float32. The functions of torch are patched, because a mode of torch's would
    be off in backward passes, in which blocks under gradient checkpointing are computed again. So
    networks must look them up in `torch.nn.functional` whenever they call them.
    """
    attention = functional.scaled_dot_product_attention

    def fused_attention(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return attention(*args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(
            patch.object(functional, "scaled_dot_product_attention", fused_attention)
        )
        patches.enter_context(patch.object(devices, "computes_bfloat16", lambda device_type: True))
        for norm in (functional.group_norm, functional.layer_norm):
            patches.enter_context(
                patch.object(functional, norm.__name__, partial(_norm_in_float32, norm))
            )
        yield


def _norm_in_float32(norm: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call a norm on x, in float32 if autocast is on."""
    if torch.is_autocast_enabled("cpu"):
        x = x.float()
    return norm(x, *args, **kwargs)
