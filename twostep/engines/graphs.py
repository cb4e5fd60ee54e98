"""Networks whose forward pass is run by another runtime, from graphs that are fixed in their sizes.

A graph is built when a call of its signature first comes, is compared with PyTorch, and is kept.
Where none can be built, the network stays in PyTorch, and whoever draws is told so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from twostep.engines.calls import Call, Signature, parts_of
from twostep.errors import TwostepError
from twostep.models.runtime import say
from twostep.networks.digest import num_weight_bytes

LARGE_BYTES = 512 * 2**20
"""From this size of its weights on a network is run item by item.

A batch gains nothing there, and every size of batch would hold the weights once more.
"""

_MAX_BATCH = 16
_MAX_GRAPHS = 8
_MAX_LARGE_GRAPHS = 1


def is_large(network: nn.Module) -> bool:
    """Tell whether a network's weights should be in memory no more often than need be."""
    return num_weight_bytes(network) >= LARGE_BYTES


class GraphError(TwostepError):
    """A graph that does not compute what its network does."""


@runtime_checkable
class Graph(Protocol):
    """A compiled network for calls of one signature; several threads may run it at once."""

    @property
    def answer_spec(self) -> Any:
        """How the tensors of an answer are put together, as torch's pytrees have it."""

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer."""


class GraphedForward:
    """A forward pass that is run from graphs.

    Args:
        network: What they are built from.
        engine: The name of the engine, for what is said to a person.
        build: Makes the graph of a call.
        otherwise: What happens where there can be no graph, for a person.
    """

    def __init__(
        self,
        network: nn.Module,
        engine: str,
        build: Callable[[nn.Module, Call], Graph],
        otherwise: str = "PyTorch does",
    ) -> None:
        self._network = network
        self._engine = engine
        self._build = build
        self._otherwise = otherwise
        self._lock = Lock()
        self._graphs: OrderedDict[Signature, Graph] = OrderedDict()
        self._refused = False
        large = is_large(network)
        self._largest_batch = 1 if large else _MAX_BATCH
        self._max_graphs = _MAX_LARGE_GRAPHS if large else _MAX_GRAPHS

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network would."""
        answer = self.graphed(*args, **kwargs)
        return self._network(*args, **kwargs) if answer is None else answer

    def graphed(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network would, from graphs; None where there can be none."""
        if self._refused:
            return None
        call = Call.of(args, kwargs)
        calls = [call]
        if call.batch is not None:
            parts = parts_of(call.batch, self._largest_batch)
            calls = [call] if len(parts) == 1 else [call.rows(part) for part in parts]
        answers = []
        for each in calls:
            graph = self._graph(each)
            if graph is None:
                return None
            answers.append(graph.run(each.tensors))
            spec = graph.answer_spec
        joined = answers[0]
        if len(answers) > 1:
            joined = [torch.cat(pieces) for pieces in zip(*answers, strict=True)]
        return pytree.tree_unflatten(joined, spec)

    def _graph(self, call: Call) -> Graph | None:
        """Return the graph of a call; None where there can be none."""
        with self._lock:
            graph = self._graphs.get(call.signature)
            if graph is not None:
                self._graphs.move_to_end(call.signature)
                return graph
            if self._refused:
                return None
            while len(self._graphs) >= self._max_graphs:
                self._graphs.popitem(last=False)
            try:
                graph = self._build(self._network, call)
            except Exception as error:  # of tracers and compilers, which raise whatever they like
                self._refused = True
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                say(
                    f"{self._engine} cannot run {type(self._network).__name__} for "
                    f"{call.signature.sizes} ({reason}), so {self._otherwise}."
                )
                return None
            self._graphs[call.signature] = graph
            return graph


def check_graph(graph: Graph, network: nn.Module, call: Call, tolerance: float) -> None:
    """Compare a graph with its network on the values of a call.

    Args:
        graph: Just built.
        network: What it was built from.
        call: The values.
        tolerance: The largest difference, in units of the largest value of each tensor.

    Raises:
        GraphError: They differ by more.
    """
    args, kwargs = pytree.tree_unflatten(call.leaves, call.signature.spec)
    with torch.no_grad():
        expected = pytree.tree_leaves(network(*args, **kwargs))
    for given, wanted in zip(graph.run(call.tensors), expected, strict=True):
        if not bool(wanted.isfinite().all()):
            continue  # overflowed in both, which sampling tells by itself
        scale = float(wanted.abs().max())
        difference = float((given - wanted).abs().max())
        # Written so that NaN fails as well.
        if not difference <= tolerance * max(scale, 1e-6):
            raise GraphError(f"its numbers differ by {difference:.2g} at {scale:.2g}")
