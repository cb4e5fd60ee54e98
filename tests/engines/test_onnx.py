"""What an exporter leaves out of a graph is not read by the network, or the graph is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from twostep.engines.calls import Call
from twostep.engines.graphs import GraphError
from twostep.engines.onnx import Onnx

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class LeavesOneUnread(nn.Module):
    """Reads its first and third tensors alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, unread: Tensor, shift: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + shift


class TakesValuesForConstants(nn.Module):
    """Reads a tensor as a Python number, which a tracer writes into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y * float(scale)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))


@torch.no_grad()
def test_a_tensor_that_a_network_does_not_read_is_passed_over() -> None:
    network = LeavesOneUnread()
    call = Call.of((torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 2)), {})
    graph = Onnx().build(network, call, "unread")
    others = [torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 2)]
    (answer,) = graph.run(others)
    torch.testing.assert_close(answer, network(*others))


@torch.no_grad()
def test_a_graph_with_one_calls_values_in_it_is_refused() -> None:
    call = Call.of((torch.randn(4, 3), torch.tensor(0.5)), {})
    with pytest.raises(GraphError, match="differ"):
        Onnx().build(TakesValuesForConstants(), call, "constants")
