"""The engines `openvino`, `openvino-bf16` and `openvino-int8`: Intel's runtime, on any x86 or ARM.

Denoiser, ControlNets, text encoders and the autoencoder are traced and compiled for fixed sizes,
which is what makes it fast: with sizes left open the same runtime takes three times as long. What
was compiled is kept on the disk. Everything between, noise, steps and guidance, stays as it is.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from threading import Lock, local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from twostep import __version__
from twostep.engines.accuracy import judge_change, picture_change
from twostep.engines.blobs import (
    BlobError,
    blob_folder,
    fingerprint,
    forget_blob,
    read_blob,
    write_blob,
)
from twostep.engines.calls import Call, Flat, with_forward
from twostep.engines.errors import EngineError
from twostep.engines.graphs import GraphedForward, check_graph
from twostep.engines.measured import measured_once
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.lora_stack import fused
from twostep.models.runtime import Runtime, say
from twostep.networks.digest import digest_of_tensors
from twostep.text.clip import quiet_transformers

PRECISIONS = ("f32", "bf16", "int8")
"""What an OpenVINO engine may compute in: exactly, in 16 bits, or with weights in 8 bits."""

TOLERANCE = 1e-3
"""How far an exact graph may be from PyTorch, in units of the largest value."""


class OpenVino:
    """Runs every network with OpenVINO.

    Args:
        precision: One of `PRECISIONS`. The two inexact ones are for the denoiser alone: an
            autoencoder in 8 bits is seen in every picture. Whether a model bears them is measured
            by two pictures of each model, once.
    """

    def __init__(self, precision: str = "f32") -> None:
        self.precision = precision
        self._lock = Lock()
        # Networks go when their bundle goes; a stack of LoRAs has its own.
        self._converted: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._prepared: WeakKeyDictionary[Bundle, Bundle] = WeakKeyDictionary()
        self._changes: WeakKeyDictionary[Bundle, dict[tuple[int, int], float]]
        self._changes = WeakKeyDictionary()

    @property
    def name(self) -> str:
        """The name by which the engine is chosen."""
        return "openvino" if self.precision == "f32" else f"openvino-{self.precision}"

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle whose networks are compiled when they are first called.

        Raises EngineError where OpenVINO, or what the precision needs, is not there, for a model
        that lies on an accelerator, and for one whose pictures a precision spoils.
        """
        prepared = self._prepared.get(bundle)
        if prepared is None:
            self._check(bundle)
            prepared = self._prepared.setdefault(bundle, self._prepare(bundle))
        if self.precision != "f32":
            self._check_pictures(bundle, prepared, sizes[0])
        return prepared

    def _prepare(self, bundle: Bundle) -> Bundle:
        parts = {
            name: self.convert(part) if name == "unet" else EXACT.convert(part)
            for name, part in bundle.parts.items()
        }
        return replace(
            bundle.with_parts(parts),
            codec=_codec(bundle.codec),
            runtime=Runtime(self.name, convert=EXACT.convert),
        )

    def _check_pictures(self, exact: Bundle, prepared: Bundle, size: tuple[int, int]) -> None:
        """Draw two pictures with both, once for these weights, and judge how far they differ.

        Raises EngineError where that is too far.
        """
        changes = self._changes.setdefault(exact, {})
        if size not in changes:
            facts = {
                "what": "mean change of a pixel, in levels of 255",
                "weights": _digest(fused(exact.denoiser.network)),
                "contract": exact.contract.to_json(),
                "engine": self.name,
                "size": size,
                "versions": versions(),
            }
            figures = measured_once(
                facts, lambda: {"levels": picture_change(exact, prepared, size)}
            )
            changes[size] = figures["levels"]
        judge_change(changes[size], self.name, exact.contract.name)

    def convert(self, network: nn.Module) -> nn.Module:
        """Return a network on the same weights that OpenVINO runs; the same one if asked again."""
        with self._lock:
            converted = self._converted.get(network)
            if converted is None:
                converted = with_forward(fused(network), self._forward)
                self._converted[network] = converted
            return converted

    def _forward(self, network: nn.Module) -> GraphedForward:
        digests: list[str] = []

        def build(network: nn.Module, call: Call) -> _OpenVinoGraph:
            if not digests:
                digests.append(_digest(network))
            return _graph(network, call, self.precision, digests[0])

        return GraphedForward(network, self.name, build)

    def _check(self, bundle: Bundle) -> None:
        """Raise EngineError where a bundle cannot be run."""
        if find_spec("openvino") is None:
            raise EngineError(
                f"the engine {self.name} is not installed. Run `pip install 'twostep[openvino]'`, "
                "or leave --engine out."
            )
        denoiser = bundle.denoiser
        if denoiser.device.type != "cpu" or denoiser.dtype != torch.float32:
            raise EngineError(
                f"the engine {self.name} runs models in float32 on the CPU; this one is in "
                f"{str(denoiser.dtype).removeprefix('torch.')} on {denoiser.device}. Draw with "
                "`--engine eager`, or with Studio(device='cpu')."
            )
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


EXACT = OpenVino()
"""The engine in float32, which the others use for what must stay exact."""


def _codec(codec: Any) -> Any:
    """Return a codec of pictures with a compiled encoder and decoder; any other as it is."""
    if not isinstance(codec, ImageCodec):
        return codec
    vae: Any = copy.copy(codec.vae)
    # The copy shares the table of its parts until it has one of its own.
    vae._modules = dict(vae._modules)
    for name in ("encoder", "decoder"):
        vae._modules[name] = EXACT.convert(vae._modules[name])
    tiny = None if codec.tiny is None else codec.tiny.converted(EXACT.convert)
    return replace(codec, vae=vae, tiny=tiny)


class _OpenVinoGraph:
    """A compiled model of OpenVINO; each thread has a request of its own.

    Args:
        compiled: What OpenVINO compiled.
        answer_spec: How the tensors of an answer are put together.
        memory: Where its weights lie, if that is not its own: it must not go before.
    """

    def __init__(self, compiled: Any, answer_spec: Any, memory: object = None) -> None:
        self.compiled = compiled
        self.answer_spec = answer_spec
        self._memory = memory
        self._of_thread = local()

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the answer."""
        from openvino import Tensor as OpenVinoTensor

        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self.compiled.create_infer_request()
        request = self._of_thread.request
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        for i, array in enumerate(arrays):
            request.set_input_tensor(i, OpenVinoTensor(array, shared_memory=True))
        request.infer()
        recorded = _recorded.get()
        if recorded is not None:
            recorded.append(self._bare_call(arrays))
        # The request writes to the same memory the next time.
        return [torch.from_numpy(each.data.copy()) for each in request.output_tensors]

    def _bare_call(self, arrays: Sequence[Any]) -> Callable[[], object]:
        """Return OpenVINO's own call on such inputs, on a request of its own."""
        from openvino import Tensor as OpenVinoTensor

        request = self.compiled.create_infer_request()
        for i, array in enumerate(arrays):
            request.set_input_tensor(i, OpenVinoTensor(array.copy(), shared_memory=False))
        infer: Callable[[], object] = request.infer
        return infer


_recorded: ContextVar[list[Callable[[], object]] | None] = ContextVar("recorded", default=None)


@contextmanager
def bare_calls() -> Iterator[list[Callable[[], object]]]:
    """Collect OpenVINO's calls during a block, for timing them with nothing around them.

    Gives a list, to which each call of a compiled network adds a function that makes it again.
    """
    token = _recorded.set([])
    try:
        calls = _recorded.get()
        assert calls is not None, "it was set above"
        yield calls
    finally:
        _recorded.reset(token)


def _graph(network: nn.Module, call: Call, precision: str, digest: str) -> _OpenVinoGraph:
    """Return the graph of a call, from the disk if it was made before."""
    settings = _settings(precision)
    name = fingerprint(
        {
            "weights": digest,
            "call": str(call.signature),
            "precision": precision,
            "settings": settings,
            "versions": versions(),
        }
    )
    graph = _read(name, settings)
    if graph is not None:
        return graph
    # Tensors that were made for inference alone cannot be traced.
    with torch.inference_mode(False), torch.no_grad():
        plain = call.rows(slice(None)) if call.batch is not None else call
        tensors = [tensor.clone() for tensor in plain.tensors]
        model, spec = _traced(network, call, tensors)
    if precision == "int8":
        model = _in_eight_bits(model)
    compiled = _core().compile_model(model, "CPU", settings)
    graph = _OpenVinoGraph(compiled, spec)
    if precision == "f32":
        check_graph(graph, network, call, TOLERANCE)
    write_blob(name, {"answer": pytree.treespec_dumps(spec)}, compiled.export_model().getvalue())
    return graph


def _read(name: str, settings: dict[str, Any]) -> _OpenVinoGraph | None:
    """Return a graph from the disk; None where there is none that can be used."""
    from openvino import Tensor as OpenVinoTensor

    try:
        blob = read_blob(name)
        if blob is None:
            return None
        spec = pytree.treespec_loads(blob.description["answer"])
        body = OpenVinoTensor(blob.body, shared_memory=True)
        compiled = _core().import_model(body, "CPU", settings)
    except (BlobError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        say(f"a compiled network in {blob_folder()} was not usable and is made anew ({reason})")
        forget_blob(name)
        return None
    return _OpenVinoGraph(compiled, spec, memory=(body, blob))


def _traced(network: nn.Module, call: Call, tensors: list[Tensor]) -> tuple[Any, Any]:
    """Return OpenVINO's model of a network for one signature, and how its answer is put together.

    Raises EngineError where the model does not take every tensor.
    """
    import openvino

    flat = Flat(network, call).eval()
    with warnings.catch_warnings(), quiet_transformers():
        # Of every branch on a size, which is fixed here.
        warnings.simplefilter("ignore")
        shapes = [list(tensor.shape) for tensor in tensors]
        model = openvino.convert_model(flat, example_input=tuple(tensors), input=shapes)
    if len(model.inputs) != len(tensors):
        raise EngineError(f"of {len(tensors)} tensors it takes {len(model.inputs)}")
    return model, flat.answer_spec


def _in_eight_bits(model: Any) -> Any:
    """Return a model whose weights are kept in 8 bits and computed with in float32."""
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)


def _settings(precision: str) -> dict[str, Any]:
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


def _digest(network: nn.Module) -> str:
    """Return a digest of a network's weights and of how it is built."""
    config: Any = getattr(network, "config", None)
    built = config.to_json_string() if hasattr(config, "to_json_string") else str(config)
    weights = digest_of_tensors(sorted(network.state_dict().items()))
    return fingerprint(
        {
            "class": type(network).__name__,
            "layers": str(network),
            "config": built,
            "weights": weights,
        }
    )
