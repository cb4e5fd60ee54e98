"""The diffusion transformer of Stable Audio as a backbone.

A token is one column of latents [components, time]. What the network is told of time and seconds is
one token more, before all others; prompt and seconds are attended to in every block (section 2.3 of
arXiv 2407.14358). This is the only file that knows what its layers are called.

It was trained on times of 0..1 at which x_t = cos(pi/2 t) x0 + sin(pi/2 t) eps and the network
predicts v. That is EDM's noise of level tan(pi/2 t) for data of deviation 1, so its contract has
EDM's schedule, and what that feeds a network, log(level) / 4, is turned into t here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from twostep.diffusion.shapes import Batch
from twostep.networks.audio_dit import Sequences
from twostep.networks.backbone import BackboneSpec, standalone
from twostep.networks.conditioning import Conditioning
from twostep.networks.recomputing import computed

_ROTARY_BASE = 10_000.0
"""Of the frequencies by which queries and keys are turned (arXiv 2104.09864)."""

_FEATURE_SHARES = (0.25, 0.5, 0.75)
"""How deep the blocks lie whose tokens are features; what comes after them makes the output."""


@dataclass(frozen=True, eq=False)
class StableAudioDit:
    """A transformer of Stable Audio with what it is conditioned on.

    Args:
        network: A `StableAudioDiTModel` of diffusers. It computes in the precision of its own
            weights; the time is embedded in float32, for in 16 bits the highest levels of noise are
            one.
    """

    network: Any

    @cached_property
    def spec(self) -> BackboneSpec:
        """The facts about this network, from its config."""
        config = self.network.config
        width = int(config.num_attention_heads * config.attention_head_dim)
        return BackboneSpec(
            family="stable-audio",
            in_channels=int(config.in_channels),
            out_channels=int(config.out_channels),
            latent_ndim=2,
            feature_widths=(width,) * len(self._feature_depths),
            feature_sides=1,
            pooled_width=int(config.global_states_input_dim),
        )

    def __call__(
        self, x: Batch, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> Tensor:
        """Return v for noisy latents.

        Args:
            x: noisy latents [batch, components, time].
            time: EDM's, which is log(level) / 4.
            conditioning: as `text.timed` makes it.
        """
        network = self.network
        hidden, run = self._begin(x, time, conditioning)
        for block in network.transformer_blocks:
            hidden = run(block, hidden)
        output = network.proj_out(hidden).transpose(1, 2)[:, :, 1:]
        refined: Tensor = network.postprocess_conv(output) + output
        return refined

    def features(
        self, x: Sequences, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> list[Float[Tensor, "batch width time"]]:
        """Return the tokens of latents after a quarter, a half and three quarters of the blocks."""
        hidden, run = self._begin(x, time, conditioning)
        levels = []
        depths = self._feature_depths
        for number, block in enumerate(self.network.transformer_blocks[: depths[-1]], start=1):
            hidden = run(block, hidden)
            if number in depths:
                levels.append(hidden.transpose(1, 2)[:, :, 1:])
        return levels

    def encoder_copy(self, lora: str | None = None) -> StableAudioDit:
        """Return a copy without the blocks behind the last features, which offers these alone.

        Raises BackboneError for a LoRA, which this backbone takes none of.
        """
        copied = standalone(self, lora)
        assert isinstance(copied, StableAudioDit)
        network = copied.network
        del network.transformer_blocks[self._feature_depths[-1] :]
        del network.proj_out, network.postprocess_conv
        return copied

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        self.network.gradient_checkpointing = enabled

    @property
    def _feature_depths(self) -> tuple[int, ...]:
        """After how many blocks features are taken, ascending, each once.

        The config counts those of a copy too that has no others.
        """
        depth = int(self.network.config.num_layers)
        return tuple(sorted({math.ceil(share * depth) for share in _FEATURE_SHARES}))

    def _begin(
        self, x: Tensor, time: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Callable[[Any, Tensor], Tensor]]:
        """Return the first tokens, and what puts tokens through a block."""
        network = self.network
        dtype = network.proj_in.weight.dtype
        x = x.to(dtype)
        text = network.cross_attention_proj(conditioning.text.to(dtype))
        told = network.global_proj(conditioning.pooled.to(dtype)[:, None])
        told = told + network.timestep_proj(self._embedded(time).to(dtype))[:, None]
        entering = (network.preprocess_conv(x) + x).transpose(1, 2)
        tokens = torch.cat([told, network.proj_in(entering)], dim=1)
        half = int(network.config.attention_head_dim) // 2
        turns = rotations(half, tokens.shape[1], tokens.device)

        def run(block: Any, hidden: Tensor) -> Tensor:
            recompute = network.gradient_checkpointing and torch.is_grad_enabled()
            through: Tensor = computed(block, recompute, hidden, None, text, None, turns)
            return through

        return tokens, run

    def _embedded(self, time: Shaped[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Return cosines and sines of the network's own time, in float32."""
        own_time = (4 * time.float()).exp().atan() * (2 / math.pi)
        phases = 2 * math.pi * own_time[:, None] * self.network.time_proj.weight.float()
        return torch.cat([phases.cos(), phases.sin()], dim=1)


def rotations(
    width: int, count: int, device: torch.device
) -> tuple[Float[Tensor, "count width"], Float[Tensor, "count width"]]:
    """Return cosines and sines of the angles by which queries and keys of tokens are turned.

    Args:
        width: numbers that are turned, in pairs that lie half of them apart.
        count: of tokens.
        device: where they are wanted.
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    positions = torch.arange(count, device=device, dtype=torch.float32)
    angles = torch.outer(positions, _ROTARY_BASE**-exponents)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()
