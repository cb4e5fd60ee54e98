"""The engine `compiled`: torch.compile.

On a CPU the blocks that a network repeats are compiled, each kind once: a tenth of the time that
the whole network takes to compile, and nearly as fast. On a GPU the whole network is compiled into
CUDA graphs, so that no call waits for Python; that path has not been run yet, for want of a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from twostep.engines.calls import with_forward
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.lora_stack import fused
from twostep.models.runtime import Runtime, say

REPEATED = (
    "TransformerBlock",
    "Resnet",
    "TinyBlock",
    "BasicTransformerBlock",
    "ResnetBlock2D",
    "AutoencoderTinyBlock",
)
"""The blocks of which UNets, ControlNets and autoencoders consist, by the names of their class.

Those of the lean networks come first, then those of diffusers.
"""

_KINDS = 128
"""Shapes of one kind of block that are compiled; torch gives up after eight."""


class Compiled:
    """Runs denoiser, ControlNets and autoencoder through torch.compile.

    Without a C++ compiler PyTorch runs them as they are, and whoever draws is told.
    """

    name = "compiled"

    def __init__(self) -> None:
        self._lock = Lock()
        self._converted: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._prepared: WeakKeyDictionary[Bundle, Bundle] = WeakKeyDictionary()

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle whose networks are compiled when they are first called."""
        missing = _missing_compiler(bundle.denoiser.device)
        if missing is not None:
            say(f"compiled draws with eager: {missing}")
            return bundle
        prepared = self._prepared.get(bundle)
        if prepared is None:
            prepared = self._prepared.setdefault(bundle, self._prepare(bundle))
        return prepared

    def convert(self, network: nn.Module) -> nn.Module:
        """Return a compiled network on the same weights; the same one if asked again."""
        with self._lock:
            converted = self._converted.get(network)
            if converted is None:
                converted = _compiled(fused(network))
                self._converted[network] = converted
            return converted

    def _prepare(self, bundle: Bundle) -> Bundle:
        codec: Any = bundle.codec
        if isinstance(codec, ImageCodec):
            vae: Any = copy.copy(codec.vae)
            vae._modules = {**vae._modules, "decoder": self.convert(vae._modules["decoder"])}
            tiny = None if codec.tiny is None else codec.tiny.converted(self.convert)
            codec = replace(codec, vae=vae, tiny=tiny)
        denoiser = bundle.denoiser
        return replace(
            bundle,
            denoiser=denoiser.with_network(self.convert(denoiser.network)),
            codec=codec,
            runtime=Runtime(self.name, convert=self.convert),
        )


def _compiled(network: nn.Module) -> nn.Module:
    """Return a copy of a network, on the same weights, that is compiled."""
    if next(network.parameters()).device.type == "cuda":
        return with_forward(network, _Graphed)
    torch._dynamo.config.recompile_limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    weights = chain(network.parameters(), network.buffers())
    copied = copy.deepcopy(network, {id(weight): weight for weight in weights})
    for block in copied.modules():
        if type(block).__name__ in REPEATED:
            block.compile(dynamic=False)
    return copied


class _Graphed:
    """A whole network as CUDA graphs, which write to the same memory every time."""

    def __init__(self, network: nn.Module) -> None:
        self._compiled = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        answers = self._compiled(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, answers)


def _missing_compiler(device: torch.device) -> str | None:
    """Say what is missing to compile for a device; None where nothing is."""
    if device.type != "cpu":
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler. Install g++ or clang, or set CXX to one."
    return None
