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
from typing import Any

import torch
from torch import nn

from twostep.engines.calls import with_forward
from twostep.engines.converting import ConvertingEngine, converted_codec
from twostep.models.bundle import Bundle
from twostep.models.runtime import Runtime, say
from twostep.training.compiling import REPEATED, compile_blocks


class Compiled(ConvertingEngine):
    """Runs denoiser, ControlNets and autoencoder through torch.compile.

    Without a C++ compiler PyTorch runs them as they are, and whoever draws is told.
    """

    name = "compiled"

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        """Return a bundle whose networks are compiled when they are first called."""
        missing = _missing_compiler(bundle.denoiser.device)
        if missing is not None:
            say(f"compiled draws with eager: {missing}")
            return bundle
        return self._prepared_once(bundle)

    def _convert(self, network: nn.Module) -> nn.Module:
        return _compiled(network)

    def _prepare(self, bundle: Bundle) -> Bundle:
        denoiser = bundle.denoiser
        return replace(
            bundle,
            denoiser=denoiser.with_network(self.convert(denoiser.network)),
            codec=converted_codec(bundle.codec, self.convert, ["decoder"]),
            runtime=Runtime(self.name, convert=self.convert),
        )


def _compiled(network: nn.Module) -> nn.Module:
    """Return a copy of a network, on the same weights, that is compiled."""
    if next(network.parameters()).device.type == "cuda":
        return with_forward(network, _Graphed)
    weights = chain(network.parameters(), network.buffers())
    copied = copy.deepcopy(network, {id(weight): weight for weight in weights})
    compile_blocks(copied, REPEATED)
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
