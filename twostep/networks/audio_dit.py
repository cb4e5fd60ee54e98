"""A diffusion transformer over time: the backbone of sounds.

A token is one column of latents [components, time]. The blocks are those of DiT (arXiv 2212.09748),
which scale, shift and gate what they compute by the time and the prompt; as in PixArt-alpha
(section 2.3 of arXiv 2310.00426) one layer makes these for all blocks, and each block adds its own
to them. Attention normalises queries and keys (arXiv 2302.05442).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.recomputing import computed

Sequences = Float[Tensor, "batch channels time"]
"""Latents of sounds."""

_TIME_WIDTH = 128
"""Sines and cosines in which the network is told the time."""

_LONGEST_PERIOD = 10_000.0
"""Of these, in the network's time, and of the positions."""

_MODULATIONS = 6
"""What a block is told: scale, shift and gate, for attention and for the two layers after it."""

_FOLD = 2
"""Rows in which features are laid out; see `AudioDit.features`."""


@dataclass(frozen=True)
class AudioDitConfig:
    """The sizes of an `AudioDit`.

    Args:
        channels: Components of latents.
        prompt_width: Numbers of a prompt.
        width: Numbers of a token; a multiple of 32 and of the heads.
        depth: Blocks.
        heads: Attention heads.
        widening: How many times wider the middle of the two layers after attention is.
    """

    channels: int
    prompt_width: int
    width: int = 192
    depth: int = 4
    heads: int = 4
    widening: int = 3


class AudioDit(nn.Module):
    """Maps noisy latents, times and pooled prompts to what the model predicts."""

    def __init__(self, config: AudioDitConfig) -> None:
        """Make a network that at first returns zeros, as DiT does.

        Args:
            config: its sizes.
        """
        super().__init__()
        self.config = config
        width = config.width
        self.enter = nn.Linear(config.channels, width)
        self.embed_time = _two_layers(_TIME_WIDTH, width, width)
        self.embed_prompt = _two_layers(config.prompt_width, width, width)
        self.modulate = nn.Linear(width, _MODULATIONS * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.leave_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave_modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, config.channels)
        self.checkpoints = False
        for layer in (self.modulate, self.leave_modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def spec(self) -> BackboneSpec:
        """The facts about this network."""
        return BackboneSpec(
            family="nano-audio",
            in_channels=self.config.channels,
            out_channels=self.config.channels,
            latent_ndim=2,
            feature_widths=(self.config.width,) * self.config.depth,
            pooled_width=self.config.prompt_width,
        )

    def forward(
        self, x: Sequences, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> Sequences:
        """Return the output for noisy latents, in the precision of the weights.

        Args:
            x: noisy latents.
            time: as the schedule says it, 0 to 1000.
            conditioning: of which the pooled prompts count.
        """
        hidden, condition = self._begin(x, time, conditioning)
        modulation = self._modulation(condition)
        for block in self.blocks:
            hidden = self._through(block, hidden, modulation)
        scale, shift = self.leave_modulation(condition)[:, None].chunk(2, dim=-1)
        leaving: Tensor = self.leave(self.leave_norm(hidden) * (1 + scale) + shift)
        return leaving.transpose(1, 2)

    def features(
        self, x: Sequences, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> list[Float[Tensor, "batch width two half"]]:
        """Return what every block makes of latents, the deepest last.

        Tokens that follow each other stand above each other, in two rows: the convolutions of a
        discriminator, which have two dimensions, then run along time over all neighbours. Where the
        number of tokens is odd, the last comes twice.
        """
        hidden, condition = self._begin(x, time, conditioning)
        modulation = self._modulation(condition)
        levels = []
        for block in self.blocks:
            hidden = self._through(block, hidden, modulation)
            levels.append(_folded(hidden))
        return levels

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        self.checkpoints = enabled

    def _begin(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return tokens and what all blocks are told."""
        dtype = self.enter.weight.dtype
        tokens = self.enter(x.to(dtype).transpose(1, 2))
        positions = torch.arange(tokens.shape[1], device=x.device)
        tokens = tokens + waves(positions, tokens.shape[2]).to(dtype)
        told = self.embed_time(waves(time, _TIME_WIDTH).to(dtype))
        return tokens, told + self.embed_prompt(conditioning.pooled.to(dtype))

    def _modulation(self, condition: Tensor) -> Float[Tensor, "batch 1 numbers"]:
        modulation: Tensor = self.modulate(nn.functional.silu(condition))
        return modulation[:, None]

    def _through(self, block: nn.Module, hidden: Tensor, modulation: Tensor) -> Tensor:
        recompute = self.checkpoints and torch.is_grad_enabled()
        through: Tensor = computed(block, recompute, hidden, modulation)
        return through


class Block(nn.Module):
    """Attention over all tokens, and two layers for each, both scaled, shifted and gated."""

    def __init__(self, config: AudioDitConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.own_modulation = nn.Parameter(torch.randn(_MODULATIONS * width) * width**-0.5)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_attention = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(width // config.heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // config.heads, eps=1e-6)
        self.from_attention = nn.Linear(width, width)
        self.layers = _two_layers(width, config.widening * width, width)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """Return tokens [batch, time, width] after this block."""
        told = (modulation + self.own_modulation).chunk(_MODULATIONS, dim=-1)
        scale, shift, gate, scale_2, shift_2, gate_2 = told
        hidden = hidden + gate * self._attend(self.norm(hidden) * (1 + scale) + shift)
        widened: Tensor = self.layers(self.norm(hidden) * (1 + scale_2) + shift_2)
        return hidden + gate_2 * widened

    def _attend(self, tokens: Tensor) -> Tensor:
        split = self.to_attention(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        mixed = functional.scaled_dot_product_attention(
            self.query_norm(query), self.key_norm(key), value
        )
        attended: Tensor = self.from_attention(mixed.transpose(1, 2).flatten(2))
        return attended


def waves(values: Shaped[Tensor, " count"], width: int) -> Float[Tensor, "count width"]:
    """Return numbers as cosines and sines of periods that grow geometrically."""
    half = width // 2
    exponents = torch.arange(half, device=values.device, dtype=torch.float32) / half
    phases: Tensor = values.float()[:, None] * torch.exp(-math.log(_LONGEST_PERIOD) * exponents)
    return torch.cat([phases.cos(), phases.sin()], dim=1)


def _folded(tokens: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch width two half"]:
    if tokens.shape[1] % _FOLD:
        tokens = torch.cat([tokens, tokens[:, -1:]], dim=1)
    pairs: Tensor = tokens.transpose(1, 2).unflatten(2, (-1, _FOLD))
    return pairs.transpose(2, 3)


def _two_layers(size: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, out))
