"""Batches of several requests in which every request gets exactly the values that it gets alone.

Kernels choose their algorithm by the size of the batch: with one thread, torch convolves a single
small image by another routine than four of them, and a product of one row is summed in another
order than one of sixteen. The last bits of float32 then differ, and one to three of 100,000 8-bit
pixel values with them. Measured on a CPU with nano (64 px, one thread): 18 of the 46 kinds of
products and convolutions in UNet and autoencoder depend on the size of the batch.

`ExactBatch` finds out which, once for every shape, with random numbers, and computes those part by
part; everything else is computed for the whole batch. `benchmarks/shared_batches.py` measures what
that costs: in batches of 16, 61 ms of processor time an image for all of a drawing, against 101 ms
one by one, and 42 ms for one request of 16 images, whose text is encoded once.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAX_KNOWN = 10_000
"""How many answers are remembered before all are forgotten; each is about one kilobyte."""

_ALIGNMENT = 64
"""Bytes at whose multiples torch begins a tensor. Some kernels sum in another order elsewhere."""

_LAYERS = frozenset(
    {
        F.linear,
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
    }
)
"""Operations whose first argument alone is a batch; the others are weights."""

_PRODUCTS = frozenset(
    {
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.bmm,
        torch.Tensor.bmm,
        torch.baddbmm,
    }
)
"""Operations in which several arguments may be batches.

These two sets are all that sums over something whose order may depend on the batch. Norms, softmax
and elementwise operations treat every item by itself.
"""

_known: dict[object, bool] = {}
"""Whether an operation on such shapes gives every part what it gets alone."""


Part = list[slice]
"""The rows of a batch that belong to one request: one stretch, or two where the batch is guided."""


class ExactBatch(TorchFunctionMode):
    """A block in which a batch computes for each of its parts what that would get by itself.

    Args:
        sizes: how many items each part has, in the order of the batch.

    A batch of sum(sizes) rows holds the parts one after the other. One of twice as many rows is
    guided: it holds all of them without the prompt, then all with it; each part's rows then go
    together, in this order, as they do when the part is drawn alone.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        count = sum(sizes)
        ends = list(accumulate(sizes))
        stretches = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._sizes = tuple(sizes)
        self._parts = {
            count: [[slice(start, end)] for start, end in stretches],
            2 * count: [
                [slice(start, end), slice(count + start, count + end)] for start, end in stretches
            ],
        }

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute one operation of torch, part by part where its kernel depends on the batch."""
        kwargs = kwargs or {}
        if not args or not (function in _LAYERS or function in _PRODUCTS):
            return function(*args, **kwargs)
        parts = self._parts.get(len(args[0]))
        if parts is None or self._is_exact(function, parts, args, kwargs):
            return function(*args, **kwargs)
        return _by_parts(function, parts, args, kwargs)

    def _is_exact(
        self,
        function: Callable[..., Any],
        parts: list[Part],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> bool:
        """Tell whether the operation gives every part what it gets alone; measured once."""
        described = (*map(_description, args), *map(_description, kwargs.values()))
        key = (function, self._sizes, torch.get_num_threads(), described)
        if key not in _known:
            if len(_known) >= _MAX_KNOWN:
                _known.clear()
            _known[key] = _measure(function, parts, args, kwargs)
        return _known[key]


def _description(value: object) -> object:
    """Return what the choice of a kernel may depend on: of tensors, all but their values."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return repr(value)


def _measure(
    function: Callable[..., Any], parts: list[Part], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Compare the whole batch with its parts, bit for bit, on random numbers.

    The real values will not do: a layer whose weights are zero would say that all is well for the
    next layer of its shape.
    """
    drawn = tuple(_random(value, seed) for seed, value in enumerate(args))
    named = {name: _random(value, 0) for name, value in kwargs.items()}
    for real, copy in zip((*args, *kwargs.values()), (*drawn, *named.values()), strict=True):
        if isinstance(real, Tensor) and real.stride() != copy.stride():
            return False  # views that repeat values cannot be imitated
    whole: Tensor = function(*drawn, **named)
    return torch.equal(whole, _by_parts(function, parts, drawn, named))


def _random(value: Any, seed: int) -> Any:
    """Return random numbers in the shape of a tensor; anything else as it is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    generator = torch.Generator(value.device).manual_seed(seed)
    return torch.empty_like(value).normal_(generator=generator)


def _by_parts(
    function: Callable[..., Any], parts: list[Part], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Call the operation once for each part and put the answers where their rows are."""
    count = len(args[0])

    def chosen(value: Any, part: Part) -> Any:
        """Return a part's rows of a further argument, if that is a batch too."""
        is_batch = isinstance(value, Tensor) and value.ndim > 2 and len(value) == count
        return _rows(value, part) if is_batch and function in _PRODUCTS else value

    answer: Tensor | None = None
    for part in parts:
        first = _rows(args[0], part)
        others = [chosen(value, part) for value in args[1:]]
        named = {name: chosen(value, part) for name, value in kwargs.items()}
        piece: Tensor = function(first, *others, **named)
        if answer is None:
            # laid out in memory as the pieces are, with the rows outermost
            strides = (piece[0].numel(), *piece.stride()[1:])
            answer = piece.new_empty_strided((count, *piece.shape[1:]), strides)
        start = 0
        for rows in part:
            end = start + rows.stop - rows.start
            answer[rows] = piece[start:end]
            start = end
    assert answer is not None, "a batch has at least one part"
    return answer


def _rows(batch: Tensor, part: Part) -> Tensor:
    """Return some rows of a batch, laid out and aligned in memory as a tensor of their own is."""
    if len(part) == 1:
        alone = batch[part[0]]
        return alone if alone.data_ptr() % _ALIGNMENT == 0 else alone.clone()
    size = sum(rows.stop - rows.start for rows in part)
    together = torch.empty_like(batch[:size])
    start = 0
    for rows in part:
        end = start + rows.stop - rows.start
        together[start:end] = batch[rows]
        start = end
    return together
