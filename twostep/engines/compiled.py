"""The engine `compiled`: torch.compile.

The blocks that a network repeats are compiled, each kind once: a tenth of the time that the whole
network takes to compile, and nearly as fast. On a GPU networks are also captured as CUDA graphs,
and of a student all steps and the decoder in one, so that no call waits for Python; that path has
not been run yet, for want of a GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from twostep.engines.calls import with_forward
from twostep.engines.captured import CapturedForward
from twostep.engines.converting import ConvertingEngine, converted_codec
from twostep.engines.fixed_run import FixedRuns
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
        run = None
        if _is_on_gpu(denoiser.network):
            run = FixedRuns(denoiser, bundle.codec, _captured_run)
        return replace(
            bundle,
            denoiser=denoiser.with_network(self.convert(denoiser.network)),
            codec=converted_codec(bundle.codec, self.convert, ["decoder"]),
            runtime=Runtime(self.name, convert=self.convert, run=run),
        )


def _compiled(network: nn.Module) -> nn.Module:
    """Return a copy of a network, on the same weights, that is compiled."""
    in_blocks = _in_blocks(network)
    return with_forward(in_blocks, CapturedForward) if _is_on_gpu(network) else in_blocks


def _captured_run(run: nn.Module) -> CapturedForward:
    """Return the forward pass of all steps, whose network's blocks are compiled, captured."""
    return CapturedForward(_in_blocks(run))


def _is_on_gpu(network: nn.Module) -> bool:
    return next(network.parameters()).device.type == "cuda"


def _in_blocks(network: nn.Module) -> nn.Module:
    """Return a copy of a network, on the same weights, whose repeated blocks are compiled."""
    weights = chain(network.parameters(), network.buffers())
    copied = copy.deepcopy(network, {id(weight): weight for weight in weights})
    compile_blocks(copied, REPEATED)
    return copied


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
