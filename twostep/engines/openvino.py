"""The engines `openvino`, `openvino-bf16` and `openvino-int8`: Intel's runtime, on any x86 or ARM.

Denoiser, ControlNets, text encoders and the autoencoder are traced and compiled for fixed sizes,
which is what makes it fast: with sizes left open the same runtime takes three times as long. What
was compiled is kept on the disk. Everything between, noise, steps and guidance, stays as it is.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from twostep import __version__
from twostep.engines.accuracy import judge_change, picture_change
from twostep.engines.blobs import Blob
from twostep.engines.calls import Call, Flat
from twostep.engines.errors import EngineError
from twostep.engines.fixed_run import FixedRuns
from twostep.engines.graphed import GraphEngine, TracedGraph, check_on_the_cpu, digest_of
from twostep.engines.graphs import Graph, check_graph, is_large
from twostep.engines.measured import measured_once
from twostep.models.bundle import Bundle
from twostep.models.lora_stack import fused
from twostep.models.runtime import RunsAllSteps
from twostep.text.clip import quiet_transformers

PRECISIONS = ("f32", "bf16", "int8")
"""What an OpenVINO engine may compute in: exactly, in 16 bits, or with weights in 8 bits."""

_KEPT_WHOLE = ("conv_in", "conv_out", "down_blocks.0")

_UNREPORTED = {"CI": "true", "NNCF_CI": "true"}

TOLERANCE = 1e-3
"""How far an exact graph may be from PyTorch, in units of the largest value."""


class OpenVino(GraphEngine):
    """Runs every network with OpenVINO.

    Args:
        precision: One of `PRECISIONS`. The two inexact ones are for the denoiser alone: an
            autoencoder in 8 bits is seen in every picture. Whether a model bears them is measured
            by two pictures of each model, once.
    """

    kept_as = "a compiled network"
    unusable = (KeyError, RuntimeError, ValueError)

    def __init__(self, precision: str = "f32") -> None:
        super().__init__()
        self.precision = precision
        self._changes: WeakKeyDictionary[Bundle, dict[tuple[int, int], float]]
        self._changes = WeakKeyDictionary()

    @property
    def name(self) -> str:
        """The name by which the engine is chosen."""
        return "openvino" if self.precision == "f32" else f"openvino-{self.precision}"

    @property
    def exact(self) -> GraphEngine:
        """OpenVINO in float32."""
        return EXACT

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle whose networks are compiled when they are first called.

        Raises EngineError where OpenVINO, or what the precision needs, is not there, for a model
        that lies on an accelerator, and for one whose pictures a precision spoils.
        """
        prepared = super().prepare(bundle, sizes)
        if self.precision != "f32":
            self._check_pictures(bundle, prepared, sizes[0])
        return prepared

    def check(self, bundle: Bundle) -> None:
        """Raise EngineError where a bundle cannot be run."""
        if find_spec("openvino") is None:
            raise EngineError(
                f"the engine {self.name} is not installed. Run `pip install 'twostep[openvino]'`, "
                "or leave --engine out."
            )
        check_on_the_cpu(bundle, self.name)
        if self.precision == "bf16" and "BF16" not in _capabilities():
            raise EngineError(
                "the engine openvino-bf16 needs a processor with bf16 instructions, and this one "
                "has none. Use openvino."
            )
        if self.precision == "int8" and find_spec("nncf") is None:
            raise EngineError(
                "the engine openvino-int8 needs nncf, which is not installed. Run "
                "`pip install 'twostep[openvino]'`, or use openvino."
            )

    def facts(self, network: nn.Module) -> dict[str, object]:
        """Return what a graph depends on, beside the network's weights and the call."""
        facts: dict[str, object] = {
            "precision": self.precision,
            "settings": settings(self.precision),
            "versions": versions(),
        }
        if self.precision == "int8":
            facts["kept whole"] = kept_whole(network)
        return facts

    def reopen(self, name: str, blob: Blob, network: nn.Module, answer_spec: Any) -> Graph:
        """Return the graph that was kept under a fingerprint."""
        from openvino import Tensor as OpenVinoTensor

        compiled_as = settings(self.precision)
        body = OpenVinoTensor(blob.body, shared_memory=True)
        compiled = _core().import_model(body, "CPU", compiled_as)
        return OpenVinoGraph(name, compiled, compiled_as, answer_spec, memory=(body, blob))

    def trace(self, name: str, network: nn.Module, call: Call) -> TracedGraph:
        """Trace and compile a network, and compare an exact graph with it on the values of a call.

        What the inexact precisions change is judged by pictures instead.
        """
        # Tensors that were made for inference alone cannot be traced.
        with torch.inference_mode(False), torch.no_grad():
            plain = call.rows(slice(None)) if call.batch is not None else call
            tensors = [tensor.clone() for tensor in plain.tensors]
            model, spec = _traced(network, call, tensors)
        if self.precision == "int8":
            model = _in_eight_bits(model, kept_whole(network))
        compiled_as = settings(self.precision)
        compiled = _core().compile_model(model, "CPU", compiled_as)
        graph = OpenVinoGraph(name, compiled, compiled_as, spec)
        if self.precision == "f32":
            check_graph(graph, network, call, TOLERANCE)
        num_bytes = _num_bytes(network, self.precision)
        return TracedGraph(graph, num_bytes, lambda: compiled.export_model().getvalue())

    def _run(self, bundle: Bundle) -> RunsAllSteps | None:
        """Return what runs all steps together, for networks that are not large."""
        if self.precision != "f32" or is_large(bundle.denoiser.network):
            return None
        otherwise = "its steps are run one by one"
        return FixedRuns(
            bundle.denoiser, bundle.codec, lambda network: self._forward(network, otherwise)
        )

    def _check_pictures(self, exact: Bundle, prepared: Bundle, size: tuple[int, int]) -> None:
        """Draw two pictures with both, once for these weights, and judge how far they differ.

        Raises EngineError where that is too far.
        """
        changes = self._changes.setdefault(exact, {})
        if size not in changes:
            facts = {
                "what": "mean change of a pixel, in levels of 255",
                "weights": digest_of(fused(exact.denoiser.network)),
                "contract": exact.contract.to_json(),
                "engine": self.name,
                "kept whole": kept_whole(exact.denoiser.network),
                "size": size,
                "versions": versions(),
            }
            figures = measured_once(
                facts, lambda: {"levels": picture_change(exact, prepared, size)}
            )
            changes[size] = figures["levels"]
        judge_change(changes[size], self.name, exact.contract.name)


EXACT = OpenVino()
"""The engine in float32, which the others use for what must stay exact."""


class OpenVinoGraph:
    """A compiled model of OpenVINO; each thread has a request of its own.

    Args:
        name: The fingerprint under which it is kept on the disk, if it is.
        compiled: What OpenVINO compiled ...
        compiled_as: ... with these settings.
        answer_spec: How the tensors of an answer are put together.
        memory: Where its weights lie, if that is not its own: it must not go before.
    """

    def __init__(
        self,
        name: str,
        compiled: Any,
        compiled_as: dict[str, Any],
        answer_spec: Any,
        memory: object = None,
    ) -> None:
        self.name = name
        self.compiled = compiled
        self.compiled_as = compiled_as
        self.answer_spec = answer_spec
        self._memory = memory
        self._of_thread = local()

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer, which nobody writes to afterwards."""
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = _Request(self.compiled)
        answers: list[Tensor] = self._of_thread.request.run(tensors)
        calls = _graph_calls.get()
        if calls is not None:
            calls.append(GraphCall(self, [tensor.clone() for tensor in tensors]))
        return answers


@dataclass(frozen=True, eq=False)
class GraphCall:
    """A call of a compiled network.

    Args:
        graph: What was called.
        tensors: What it was given.
    """

    graph: OpenVinoGraph
    tensors: Sequence[Tensor]

    def again(self) -> Callable[[], object]:
        """Return a function that makes the call again, with nothing around it."""
        request = _Request(self.graph.compiled)
        request.run(self.tensors)
        return request.infer


class _Request:
    """One thread's request to a compiled model, which reads and writes torch's own memory.

    Args:
        compiled: What OpenVINO compiled.
    """

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._shapes = [tuple(port.shape) for port in compiled.outputs]
        self._dtypes = [_torch_dtype(port) for port in compiled.outputs]
        # OpenVINO keeps the places of tensors, and nothing else keeps the tensors there.
        self._inputs: dict[int, Tensor] = {}
        self._answers: list[Tensor] = []

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer, each time in other memory."""
        from openvino import Tensor as OpenVinoTensor

        for i, tensor in enumerate(tensors):
            given = tensor.detach().contiguous()
            known = self._inputs.get(i)
            # Text, for example, is the same in every step.
            if known is None or known.data_ptr() != given.data_ptr():
                shared = OpenVinoTensor(given.numpy(), shared_memory=True)
                self._request.set_input_tensor(i, shared)
                self._inputs[i] = given
        answers = []
        for i, (shape, dtype) in enumerate(zip(self._shapes, self._dtypes, strict=True)):
            answer = torch.empty(shape, dtype=dtype)
            shared = OpenVinoTensor(answer.numpy(), shared_memory=True)
            self._request.set_output_tensor(i, shared)
            answers.append(answer)
        self._answers = answers
        self.infer()
        return answers

    def infer(self) -> None:
        """Compute once more, from what was last given, to where it was last wanted."""
        self._request.infer(share_outputs=True)


def _torch_dtype(port: Any) -> torch.dtype:
    """Return the precision of an input or an output as torch has it."""
    return torch.from_numpy(np.empty(0, port.element_type.to_dtype())).dtype


_graph_calls: ContextVar[list[GraphCall] | None] = ContextVar("graph_calls", default=None)


@contextmanager
def graph_calls() -> Iterator[list[GraphCall]]:
    """Collect the calls of compiled networks during a block; gives the list of them."""
    token = _graph_calls.set([])
    try:
        calls = _graph_calls.get()
        assert calls is not None, "it was set above"
        yield calls
    finally:
        _graph_calls.reset(token)


def _num_bytes(network: nn.Module, precision: str) -> int:
    """Return about how many bytes the weights of a compiled network take."""
    num_bytes = sum(parameter.nbytes for parameter in network.parameters())
    return num_bytes // 4 if precision == "int8" else num_bytes


def _traced(network: nn.Module, call: Call, tensors: list[Tensor]) -> tuple[Any, Any]:
    """Return OpenVINO's model of a network for one signature, and how its answer is put together.

    Raises EngineError where the model does not take every tensor.
    """
    import openvino

    flat = Flat(network, call).eval()
    with warnings.catch_warnings(), quiet_transformers(), unreported():
        # Of every branch on a size, which is fixed here.
        warnings.simplefilter("ignore")
        shapes = [list(tensor.shape) for tensor in tensors]
        model = openvino.convert_model(flat, example_input=tuple(tensors), input=shapes)
    if len(model.inputs) != len(tensors):
        raise EngineError(f"of {len(tensors)} tensors it takes {len(model.inputs)}")
    return model, flat.answer_spec


@contextmanager
def unreported() -> Iterator[None]:
    """Keep OpenVINO and nncf from reporting what they convert to their makers.

    They do it over the network, unless they take the process for one of a continuous integration.
    """
    before = {name: os.environ.get(name) for name in _UNREPORTED}
    os.environ.update(_UNREPORTED)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def kept_whole(network: nn.Module) -> tuple[str, ...]:
    """Return the modules of a denoiser, by name, whose weights an int8 engine keeps in float32.

    They are those of the highest resolution, after which nothing evens errors out, and those that
    embed the time: few of the weights, and most of the change that 8 bits make in pictures.
    """
    names = {name for name, _ in network.named_modules()}
    last = f"up_blocks.{len(getattr(network, 'up_blocks', ())) - 1}"
    return tuple(name for name in (*_KEPT_WHOLE, last) if name in names)


def _in_eight_bits(model: Any, whole: Sequence[str]) -> Any:
    """Return a model whose weights are kept in 8 bits and computed with in float32.

    Args:
        model: of OpenVINO, traced from a `Flat` network.
        whole: names of the modules whose weights stay as they are.
    """
    with unreported():
        import nncf

    patterns = [rf"__module\.network\.{re.escape(name)}[./].*" for name in whole]
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT8_ASYM,
        ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
    )


def settings(precision: str) -> dict[str, Any]:
    """Return how a model is compiled: as fast as can be for one picture, on torch's threads."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Threads that are bound to a core wait for other processes on it.
        "ENABLE_CPU_PINNING": False,
    }


@lru_cache(maxsize=1)
def _core() -> Any:
    from openvino import Core

    return Core()


@lru_cache(maxsize=1)
def _capabilities() -> list[str]:
    """Return what the processor can compute in, as OpenVINO calls it."""
    return list(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return all but the weights that a compiled model depends on."""
    import openvino

    return {
        "twostep": __version__,
        "openvino": openvino.__version__,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "processor": str(_core().get_property("CPU", "FULL_DEVICE_NAME")),
    }
