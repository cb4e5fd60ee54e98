"""Calls of a network as flat lists of tensors, which other runtimes take.

A network is called with tensors in tuples and dicts, and answers with a structure of tensors too. A
`Signature` is such a call without its values: two calls with the same signature can be answered by
the same compiled graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[..., Any]
"""A network's forward pass."""


@dataclass(frozen=True)
class Signature:
    """What of a call decides about its graph.

    Args:
        spec: How arguments lie in tuples and dicts.
        constants: Each argument that is no tensor as text, with its place.
        shapes: Of every tensor.
        dtypes: Of every tensor.
    """

    spec: Any
    constants: tuple[tuple[int, str], ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def __hash__(self) -> int:
        """Return a hash of all but the spec, whose own hash takes as long as a small layer."""
        return hash((self.constants, self.shapes))

    def __str__(self) -> str:
        """Return a text that is the same for the same signature, in every process."""
        return repr((pytree.treespec_dumps(self.spec), self.constants, self.shapes, self.dtypes))

    @property
    def sizes(self) -> str:
        """The shape of the first tensor, for a person."""
        return "x".join(map(str, self.shapes[0])) if self.shapes else "no tensor"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a network.

    Args:
        signature: All but the values.
        leaves: All arguments in order, those that are no tensors too.
        tensors: The tensors among them. Numbers with a fraction, such as the scale of a ControlNet,
            count as tensors, for a graph must not depend on them.
    """

    signature: Signature
    leaves: list[Any]
    tensors: list[Tensor]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Take arguments apart."""
        leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
        leaves = [torch.tensor(each) if isinstance(each, float) else each for each in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        constants = tuple(
            (i, repr(leaf)) for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)
        )
        signature = Signature(
            spec,
            constants,
            tuple(tuple(tensor.shape) for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
        )
        return cls(signature, leaves, tensors)

    @property
    def batch(self) -> int | None:
        """How many items all tensors but single numbers have; None where they differ."""
        counts = {tensor.shape[0] for tensor in self.tensors if tensor.ndim > 0}
        return counts.pop() if len(counts) == 1 else None

    def rows(self, part: slice) -> Call:
        """Return the call for some items of the batch."""
        leaves = [
            leaf[part] if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.signature.spec)
        return Call.of(args, kwargs)

    def with_others_at(self, places: Sequence[int]) -> Call:
        """Return the call with other values in some of its tensors, counted as in `tensors`."""
        others = {id(self.tensors[place]): self.tensors[place] + 1 for place in places}
        leaves = [others.get(id(leaf), leaf) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.signature.spec)
        return Call.of(args, kwargs)


class Flat(nn.Module):
    """A network that takes and returns flat tensors, as tracers and exporters want it."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.answer_spec: Any = None
        self._call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the network's answer, in order."""
        remaining = iter(tensors)
        leaves = [
            next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._call.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._call.signature.spec)
        answers, self.answer_spec = pytree.tree_flatten(self.network(*args, **kwargs))
        return tuple(answers)


def with_forward(network: nn.Module, make: Callable[[nn.Module], Forward]) -> nn.Module:
    """Return a copy of a network, on the same weights, whose forward pass is another one.

    Args:
        network: Stays as it is.
        make: Gets a further copy with the network's own forward pass, and returns the other one.
    """
    replaced = copy.copy(network)
    # An attribute of the instance goes before the method of its class.
    object.__setattr__(replaced, "forward", make(copy.copy(network)))
    return replaced


def parts_of(count: int, largest: int) -> list[slice]:
    """Cut a batch into parts of which only few sizes occur: 1, 2, 4, ... up to the largest."""
    parts = []
    start = 0
    while start < count:
        size = min(largest, 1 << (count - start).bit_length() - 1)
        parts.append(slice(start, start + size))
        start += size
    return parts
