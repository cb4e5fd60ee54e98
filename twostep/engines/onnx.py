"""The engine `onnx`: ONNX Runtime, the portable choice for processors that OpenVINO does not know.

Graphs hold no weights but those that the exporter changed: ONNX Runtime is lent the network's own.
A graph that takes more than 2 GiB all the same is not run by it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from twostep import __version__
from twostep.engines.blobs import Blob
from twostep.engines.calls import Call, Flat
from twostep.engines.errors import EngineError
from twostep.engines.graphed import GraphEngine, TracedGraph, check_on_the_cpu
from twostep.engines.graphs import Graph, check_graph
from twostep.models.bundle import Bundle

TOLERANCE = 1e-3
"""How far a graph may be from PyTorch, in units of the largest value."""

_OPSET = 17
_MOST_BYTES = 2**31 - 1
_INPUT = "input"
"""With its number, what graphs call a tensor of a call."""
_LOCATION = "weights"
"""What graphs call the place of their weights, which lie in no file."""


class Onnx(GraphEngine):
    """Runs every network with ONNX Runtime, in float32."""

    kept_as = "an exported network"
    # What ONNX Runtime raises derives from nothing in common.
    unusable = (Exception,)

    @property
    def name(self) -> str:
        """The name by which the engine is chosen."""
        return "onnx"

    def check(self, bundle: Bundle) -> None:
        """Raise EngineError where a bundle cannot be run."""
        if find_spec("onnxruntime") is None or find_spec("onnx") is None:
            raise EngineError(
                "the engine onnx is not installed. Run `pip install 'twostep[onnx]'`, or leave "
                "--engine out."
            )
        check_on_the_cpu(bundle, self.name)

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Return what a graph depends on, beside the network's weights and the call."""
        return {"engine": self.name, "versions": versions()}

    def reopen(self, name: str, blob: Blob, network: nn.Module, answer_spec: Any) -> Graph:
        """Return the graph that was kept under a fingerprint."""
        return _OnnxGraph(blob.body.tobytes(), network, answer_spec)

    def trace(self, name: str, network: nn.Module, call: Call) -> TracedGraph:
        """Export a network and compare the graph with it, on the values of a call."""
        model, spec = _exported(network, call)
        model = _without(model, _weights(network))
        graph = _OnnxGraph(model, network, spec)
        check_graph(graph, network, call, TOLERANCE)
        left_out = graph.left_out(len(call.tensors))
        if left_out:
            # Right for a tensor that a network never reads; wrong where the exporter took the
            # values of this one call for constants.
            check_graph(graph, network, call.with_others_at(left_out), TOLERANCE)
        return TracedGraph(graph, len(model), lambda: model)


class _OnnxGraph:
    """A network in ONNX Runtime, which several threads may run at once.

    Args:
        model: The graph without its weights, as the bytes of ONNX.
        network: Whose weights it is lent.
        answer_spec: How the tensors of an answer are put together.
    """

    def __init__(self, model: bytes, network: nn.Module, answer_spec: Any) -> None:
        import onnxruntime

        self.answer_spec = answer_spec
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # ONNX Runtime keeps the places of what it is lent, so that it must stay there.
        names = _lent(model)
        self._weights = {name: _weights(network)[name] for name in names}
        values = [
            onnxruntime.OrtValue.ortvalue_from_numpy(weight.numpy())
            for weight in self._weights.values()
        ]
        options.add_external_initializers(list(self._weights), values)
        self._values = values
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        # The exporter leaves out inputs that a network does not read.
        self._read = {
            int(each.name.removeprefix(_INPUT)): each.name for each in self._session.get_inputs()
        }

    def left_out(self, count: int) -> list[int]:
        """Return which of so many tensors the graph does not read."""
        return [number for number in range(count) if number not in self._read]

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer."""
        arrays = {
            name: tensors[number].detach().contiguous().numpy()
            for number, name in self._read.items()
        }
        return [torch.from_numpy(answer) for answer in self._session.run(None, arrays)]


def _exported(network: nn.Module, call: Call) -> tuple[bytes, Any]:
    """Return the graph of a network for one signature, and how its answer is put together."""
    flat = Flat(network, call).eval()
    # Tensors that were made for inference alone cannot be traced.
    with (
        TemporaryDirectory() as folder,
        torch.inference_mode(False),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        path = Path(folder, "network.onnx")
        # Of every branch on a size, which is fixed here, and of the exporter's age.
        warnings.simplefilter("ignore")
        tensors = tuple(tensor.clone() for tensor in call.tensors)
        torch.onnx.export(
            flat,
            tensors,
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=[f"{_INPUT}{number}" for number in range(len(tensors))],
        )
        return path.read_bytes(), flat.answer_spec


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by the names that graphs have for them."""
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {f"network.{name}": value.detach().contiguous() for name, value in state.items()}


def _without(model: bytes, weights: Mapping[str, Tensor]) -> bytes:
    """Return a graph without the values of a network's own weights.

    Raises EngineError where what is left is too large for ONNX.
    """
    import onnx

    proto = onnx.load_from_string(model)
    for initializer in proto.graph.initializer:
        weight = weights.get(initializer.name)
        if weight is None or tuple(initializer.dims) != tuple(weight.shape):
            continue
        initializer.ClearField("raw_data")
        initializer.data_location = onnx.TensorProto.EXTERNAL
        initializer.external_data.add(key="location", value=_LOCATION)
    if proto.ByteSize() >= _MOST_BYTES:
        raise EngineError("its graph takes more than 2 GiB")
    serialised: bytes = proto.SerializeToString()
    return serialised


def _lent(model: bytes) -> list[str]:
    """Return the names of the weights that a graph wants to be lent."""
    import onnx

    proto = onnx.load_from_string(model)
    external = onnx.TensorProto.EXTERNAL
    return [each.name for each in proto.graph.initializer if each.data_location == external]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return all but the network that an exported graph depends on."""
    return {
        "twostep": __version__,
        "onnxruntime": version("onnxruntime"),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }
