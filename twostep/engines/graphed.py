"""What engines have in common that run every network from graphs of fixed sizes, on the CPU.

Denoiser, ControlNets, text encoders and the autoencoder each become a network on the same weights
whose forward pass is run from graphs. Everything between, noise, steps and guidance, stays as it
is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from twostep.engines.blobs import Blob, fingerprint, has_room, restored, write_blob
from twostep.engines.calls import Call, with_forward
from twostep.engines.converting import ConvertingEngine, converted_codec, decoding_at_once
from twostep.engines.errors import EngineError
from twostep.engines.graphs import Graph, GraphedForward
from twostep.models.bundle import Bundle
from twostep.models.runtime import RunsAllSteps, Runtime
from twostep.networks.digest import digest_of_tensors


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """A graph that was just traced, and what of it is kept on the disk.

    Args:
        graph: It.
        num_bytes: About how many bytes are kept.
        body: Returns them.
    """

    graph: Graph
    num_bytes: int
    body: Callable[[], bytes]


class GraphEngine(ConvertingEngine):
    """An engine that runs networks from graphs.

    Attributes:
        kept_as: What it keeps on the disk, for a person.
        unusable: What its runtime raises of what was kept and cannot be used.
    """

    kept_as: str
    unusable: tuple[type[Exception], ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name by which the engine is chosen."""

    @abstractmethod
    def check(self, bundle: Bundle) -> None:
        """Raise EngineError where a bundle cannot be run."""

    @abstractmethod
    def facts(self, network: nn.Module) -> dict[str, object]:
        """Return what a graph depends on, beside the network's weights and the call."""

    @abstractmethod
    def reopen(self, name: str, blob: Blob, network: nn.Module, answer_spec: Any) -> Graph:
        """Return the graph that was kept under a fingerprint.

        Args:
            name: The fingerprint.
            blob: What was kept.
            network: What it was built from.
            answer_spec: How the tensors of an answer are put together.
        """

    @abstractmethod
    def trace(self, name: str, network: nn.Module, call: Call) -> TracedGraph:
        """Trace a network and compare the graph with it, on the values of a call.

        Args:
            name: The fingerprint under which the graph is kept.
            network: Whose call it is.
            call: The call.

        Raises:
            GraphError: The graph does not compute what the network does.
        """

    def build(self, network: nn.Module, call: Call, digest: str) -> Graph:
        """Return the graph of a call, from the disk if it was built before.

        Args:
            network: Whose call it is.
            call: The call.
            digest: Of the network's weights and of how it is built.
        """
        facts = {**self.facts(network), "weights": digest, "call": str(call.signature)}
        name = fingerprint(facts)

        def load(blob: Blob) -> Graph:
            spec = pytree.treespec_loads(blob.description["answer"])
            return self.reopen(name, blob, network, spec)

        graph = restored(name, load, what=self.kept_as, errors=self.unusable)
        if graph is not None:
            return graph
        traced = self.trace(name, network, call)
        # Asked before there are any bytes, for they may take as much memory again, twice.
        if has_room(traced.num_bytes):
            description = {"answer": pytree.treespec_dumps(traced.graph.answer_spec)}
            write_blob(name, description, traced.body())
        return traced.graph

    @property
    def exact(self) -> GraphEngine:
        """The engine for what must stay exact, which is all but the denoiser: this one."""
        return self

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle whose networks are compiled when they are first called.

        Raises EngineError where the runtime is not there, and for a model that lies on an
        accelerator.
        """
        if bundle not in self._prepared:
            self.check(bundle)
        return self._prepared_once(bundle)

    def _convert(self, network: nn.Module) -> nn.Module:
        return with_forward(network, self._forward)

    def _prepare(self, bundle: Bundle) -> Bundle:
        parts = {
            name: self.convert(part) if name == "unet" else self.exact.convert(part)
            for name, part in bundle.parts.items()
        }
        return replace(
            bundle.with_parts(parts),
            codec=decoding_at_once(
                converted_codec(bundle.codec, self.exact.convert, ["encoder"]),
                self.exact.convert,
            ),
            runtime=Runtime(self.name, convert=self.exact.convert, run=self._run(bundle)),
        )

    def _run(self, bundle: Bundle) -> RunsAllSteps | None:
        """Return what runs all steps of a drawing together, if the engine can do that."""
        return None

    def _forward(self, network: nn.Module, otherwise: str = "PyTorch does") -> GraphedForward:
        """Return the forward pass of a network as the engine runs it."""
        digests: list[str] = []

        def build(network: nn.Module, call: Call) -> Graph:
            if not digests:
                digests.append(digest_of(network))
            return self.build(network, call, digests[0])

        return GraphedForward(network, self.name, build, otherwise)


def check_on_the_cpu(bundle: Bundle, engine: str) -> None:
    """Raise EngineError for a model that is not in float32 on the CPU."""
    denoiser = bundle.denoiser
    if denoiser.device.type != "cpu" or denoiser.dtype != torch.float32:
        raise EngineError(
            f"the engine {engine} runs models in float32 on the CPU; this one is in "
            f"{str(denoiser.dtype).removeprefix('torch.')} on {denoiser.device}. Draw with "
            "`--engine eager`, or with Studio(device='cpu')."
        )


def digest_of(network: nn.Module) -> str:
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
