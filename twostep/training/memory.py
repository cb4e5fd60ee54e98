"""Metering the memory of a training without having that memory.

Code under a `Meter` runs on fake tensors, which have shapes but no values; the meter adds up the
bytes of the storages that live. What torch's kernels take inside themselves, and what the process
itself takes (about half a GiB), is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from twostep.training import device as devices


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
        result = super().__torch_dispatch__(func, types, args, without_generator)
        # While torch remembers which tensors it has converted, no module can be moved.
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

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


def is_metered(tensor: Tensor) -> bool:
    """Tell whether a tensor has no values, as under a `Meter`."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def computing_off_cpu() -> Iterator[None]:
    """Let fake tensors on the CPU take the memory that they would take on an accelerator.

    There bfloat16 is computed, whatever this CPU can do, attention is fused, and norms under
    autocast compute in float32. The functions of torch are patched, because a mode of torch's would
    be off in backward passes, in which blocks under gradient checkpointing are computed again.
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
