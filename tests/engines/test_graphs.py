"""Calls are taken apart and put together again; graphs are built once for every signature, and what
has none stays in PyTorch with a word.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twostep.engines import graphs
from twostep.engines.calls import Call, Flat, parts_of, with_forward
from twostep.engines.graphs import GraphedForward, GraphError, check_graph
from twostep.models.runtime import take_notes


class Affine(nn.Module):
    """Answers with a dict, and takes a number and a flag beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0, *, more: dict[str, Any]) -> dict[str, Tensor]:
        shift = more["shift"] if more["is_shifted"] else 0
        return {"y": self.layer(x) * scale + shift}


class InTorch:
    """A graph that PyTorch runs; `off` makes it wrong."""

    def __init__(self, network: nn.Module, call: Call, off: float = 0.0) -> None:
        self.flat = Flat(network, call)
        self.flat(*call.tensors)
        self.answer_spec = self.flat.answer_spec
        self.off = off
        self.counts: list[int] = []

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self.counts.append(len(tensors[0]))
        return [answer.detach() + self.off for answer in self.flat(*tensors)]


def call_of(count: int, scale: float = 1.0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(count)
    more = {"shift": torch.randn(count, 2), "is_shifted": True}
    return (torch.randn(count, 3), scale), {"more": more}


def test_a_batch_is_cut_into_few_sizes() -> None:
    assert parts_of(1, 16) == [slice(0, 1)]
    assert [part.stop - part.start for part in parts_of(7, 16)] == [4, 2, 1]
    assert [part.stop - part.start for part in parts_of(37, 16)] == [16, 16, 4, 1]
    assert [part.stop - part.start for part in parts_of(3, 1)] == [1, 1, 1]
    assert parts_of(37, 16)[-1].stop == 37


def test_a_signature_says_all_but_the_values() -> None:
    def signature(count: int = 2, scale: float = 1.0, shifted: bool = True) -> str:
        args, kwargs = call_of(count, scale)
        kwargs["more"]["is_shifted"] = shifted
        return str(Call.of(args, kwargs).signature)

    assert signature() == signature(scale=0.3)  # a scale is a value
    assert signature() != signature(count=3)
    assert signature() != signature(shifted=False)


def test_a_graphed_network_answers_as_the_network_in_parts() -> None:
    network = Affine()
    built: list[InTorch] = []

    def build(plain: nn.Module, call: Call) -> InTorch:
        built.append(InTorch(plain, call))
        return built[-1]

    graphed = with_forward(network, lambda plain: GraphedForward(plain, "toy", build))
    assert isinstance(graphed, Affine)
    for count, scale in ((7, 1.0), (7, 0.5), (2, 1.0)):
        args, kwargs = call_of(count, scale)
        torch.testing.assert_close(graphed(*args, **kwargs), network(*args, **kwargs))
    assert [graph.counts[0] for graph in built] == [4, 2, 1]  # each built once
    assert network.forward.__func__ is Affine.forward


def test_large_networks_are_run_item_by_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LARGE_BYTES", 1)
    network = Affine()
    built: list[InTorch] = []

    def build(plain: nn.Module, call: Call) -> InTorch:
        built.append(InTorch(plain, call))
        return built[-1]

    args, kwargs = call_of(3)
    graphed = GraphedForward(network, "toy", build)
    torch.testing.assert_close(graphed(*args, **kwargs), network(*args, **kwargs))
    assert [graph.counts for graph in built] == [[1, 1, 1]]


def test_what_cannot_be_built_stays_in_torch_with_a_word() -> None:
    network = Affine()
    attempts = []

    def build(plain: nn.Module, call: Call) -> InTorch:
        attempts.append(call)
        raise RuntimeError("no such operation: Frobnicate\nand a long trace")

    graphed = GraphedForward(network, "toy", build)
    take_notes()
    for _ in range(2):
        args, kwargs = call_of(3)
        torch.testing.assert_close(graphed(*args, **kwargs), network(*args, **kwargs))
    assert len(attempts) == 1
    assert take_notes() == [
        "toy cannot run Affine for 2x3 (no such operation: Frobnicate), so PyTorch does."
    ]
    assert take_notes() == []


def test_a_wrong_graph_is_told_from_a_right_one() -> None:
    network = Affine()
    args, kwargs = call_of(2)
    call = Call.of(args, kwargs)
    check_graph(InTorch(network, call, off=1e-5), network, call, 1e-3)
    for off in (0.1, float("nan")):
        with pytest.raises(GraphError, match="its numbers differ"):
            check_graph(InTorch(network, call, off=off), network, call, 1e-3)
