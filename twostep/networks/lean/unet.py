"""SDXL's UNet (section 2 of arXiv 2307.01952) with the weights' names of diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from twostep.networks.lean.blocks import Downsample, Resnet, SpatialTransformer, Upsample
from twostep.networks.lean.config import LeanNetwork, has_entries, per_level

_CROSS_DOWN = "CrossAttnDownBlock2D"
_CROSS_UP = "CrossAttnUpBlock2D"

_EXPECTED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "attention_type": (None, "default"),
    "center_input_sample": (None, False),
    "class_embed_type": None,
    "conv_in_kernel": (None, 3),
    "conv_out_kernel": (None, 3),
    "cross_attention_norm": None,
    "downsample_padding": (None, 1),
    "dual_cross_attention": (None, False),
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": (None, True),
    "freq_shift": (None, 0),
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": (None, 1),
    "mid_block_type": (None, "UNetMidBlock2DCrossAttn"),
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": (None, False),
    "resnet_out_scale_factor": (None, 1.0),
    "resnet_skip_time_act": (None, False),
    "resnet_time_scale_shift": (None, "default"),
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": (None, "positional"),
    "timestep_post_act": None,
    "upcast_attention": (None, False),
}
"""Entries that must have these values, of those that a config may leave out among them."""


class LeanUnet(LeanNetwork):
    """A UNet that computes what diffusers' computes for the calls that drawing makes.

    Args:
        config: As diffusers writes it; `fits` must say yes to it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({"num_class_embeds": None, **config})
        entries = self.config
        widths = list(entries.block_out_channels)
        time_width = 4 * widths[0]
        plan = _Plan(entries)
        self.conv_in = nn.Conv2d(entries.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_width)
        self.add_embedding = Embedding(entries.projection_class_embeddings_input_dim, time_width)
        self.down_blocks = nn.ModuleList(DownBlock(plan, level) for level in range(len(widths)))
        self.mid_block = MidBlock(plan)
        self.up_blocks = nn.ModuleList(
            UpBlock(plan, level) for level in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(plan.groups, widths[0], eps=plan.eps)
        self.conv_out = nn.Conv2d(widths[0], entries.out_channels, 3, padding=1)

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Tell whether a config asks for nothing but what this class does."""
        blocks = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
        known = {_CROSS_DOWN, "DownBlock2D", _CROSS_UP, "UpBlock2D"}
        depths = config.get("transformer_layers_per_block", 1)
        is_plain = isinstance(depths, int) or all(isinstance(each, int) for each in depths)
        numbers = (config.get("norm_num_groups"), config.get("cross_attention_dim"))
        return (
            has_entries(config, _EXPECTED)
            and set(blocks) <= known
            and is_plain
            and all(isinstance(number, int) for number in numbers)
        )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        added_cond_kwargs: Mapping[str, Tensor],
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the raw output [batch, out_channels, h, w], alone in a tuple.

        Args:
            sample: Noisy latents [batch, in_channels, h, w].
            timestep: Times as the network reads them, one per item.
            encoder_hidden_states: The text [batch, tokens, width].
            added_cond_kwargs: "text_embeds" [batch, pooled] and "time_ids" [batch, 6].
            down_block_additional_residuals: What ControlNets add to each skip, in order.
            mid_block_additional_residual: What they add in the middle.
            return_dict: False, as diffusers' callers say it: nothing else is there.
        """
        time = self._time(sample, timestep, added_cond_kwargs)
        text = encoder_hidden_states
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, passed = block(x, time, text)
            skips += passed
        if down_block_additional_residuals:
            pairs = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + added for skip, added in pairs]
        x = self.mid_block(x, time, text)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        upper: Any
        for upper in self.up_blocks:
            taken, skips = skips[-upper.count :], skips[: -upper.count]
            size = skips[-1].shape[-2:] if skips else None
            x = upper(x, time, text, taken, size)
        return (self.conv_out(silu(self.conv_norm_out(x))),)

    def _time(self, sample: Tensor, timestep: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the embedding of times, sizes and pooled text [batch, time width]."""
        width = self.config.block_out_channels[0]
        waves = sinusoids(timestep.expand(len(sample)), width).to(sample.dtype)
        time = self.time_embedding(waves)
        pooled = added["text_embeds"]
        sizes = sinusoids(added["time_ids"].flatten(), self.config.addition_time_embed_dim)
        beside = torch.cat([pooled, sizes.reshape(len(pooled), -1)], dim=-1).to(time.dtype)
        embedded: Tensor = time + self.add_embedding(beside)
        return embedded


class _Plan:
    """What a config says of each level, from the largest to the smallest."""

    def __init__(self, config: Any) -> None:
        count = len(config.block_out_channels)
        self.widths = list(config.block_out_channels)
        self.layers = per_level(config.layers_per_block, count)
        self.depths = per_level(config.get("transformer_layers_per_block", 1), count)
        self.heads = per_level(config.attention_head_dim, count)  # diffusers' name; it counts heads
        self.context_width = config.cross_attention_dim
        self.groups = config.norm_num_groups
        self.eps = config.get("norm_eps", 1e-5)
        self.is_linear = bool(config.get("use_linear_projection", False))
        self.is_cross_down = [kind == _CROSS_DOWN for kind in config.down_block_types]
        self.is_cross_up = [kind == _CROSS_UP for kind in reversed(config.up_block_types)]

    def resnet(self, width_in: int, width_out: int) -> Resnet:
        """Return a block of two convolutions."""
        time_width = 4 * self.widths[0]
        return Resnet(width_in, width_out, groups=self.groups, eps=self.eps, time_width=time_width)

    def transformers(self, level: int, count: int) -> nn.ModuleList:
        """Return the transformers of a level."""
        return nn.ModuleList(
            SpatialTransformer(
                self.widths[level],
                self.heads[level],
                self.depths[level],
                context_width=self.context_width,
                groups=self.groups,
                is_linear=self.is_linear,
            )
            for _ in range(count)
        )


class DownBlock(nn.Module):
    """One level on the way down."""

    def __init__(self, plan: _Plan, level: int) -> None:
        super().__init__()
        width = plan.widths[level]
        count = plan.layers[level]
        steps = [plan.widths[max(0, level - 1)], *[width] * count]
        self.resnets = nn.ModuleList(plan.resnet(*step) for step in pairwise(steps))
        has_text = plan.is_cross_down[level]
        self.attentions = plan.transformers(level, count) if has_text else None
        self.downsamplers = None
        if level + 1 < len(plan.widths):
            self.downsamplers = nn.ModuleList([Downsample(width, padding=1)])

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return features, and what is passed on to the way up."""
        passed = []
        for number, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions is not None:
                x = self.attentions[number](x, text)
            passed.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            passed.append(x)
        return x, passed


class MidBlock(nn.Module):
    """The middle, at the smallest size."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        width = plan.widths[-1]
        self.resnets = nn.ModuleList(plan.resnet(width, width) for _ in range(2))
        self.attentions = plan.transformers(len(plan.widths) - 1, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Return features of the same shape."""
        first, second = self.resnets
        x = self.attentions[0](first(x, time), text)
        out: Tensor = second(x, time)
        return out


class UpBlock(nn.Module):
    """One level on the way up."""

    def __init__(self, plan: _Plan, level: int) -> None:
        super().__init__()
        widths = plan.widths
        width = widths[level]
        self.count = count = plan.layers[level] + 1
        below = widths[min(level + 1, len(widths) - 1)]
        inputs = [below, *[width] * (count - 1)]
        # The last skip of a level was passed on by the level above it, or is the input.
        skips = [*[width] * (count - 1), widths[max(0, level - 1)]]
        self.resnets = nn.ModuleList(
            plan.resnet(came + skip, width) for came, skip in zip(inputs, skips, strict=True)
        )
        has_text = plan.is_cross_up[level]
        self.attentions = plan.transformers(level, count) if has_text else None
        self.upsamplers = nn.ModuleList([Upsample(width)]) if level > 0 else None

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, skips: Sequence[Tensor], size: Any
    ) -> Tensor:
        """Return features, at the size (h, w) of the next level's skips."""
        for number, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions is not None:
                x = self.attentions[number](x, text)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, size)
        return x


class Embedding(nn.Module):
    """Two layers on what a time or sizes became."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the embedding [batch, width]."""
        embedded: Tensor = self.linear_2(silu(self.linear_1(x)))
        return embedded


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Return cosines and sines of numbers at falling frequencies [numbers, width], in float32.

    Those of section 3.5 of arXiv 1706.03762; the width must be even.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequencies = torch.exp(-math.log(10000) * steps / half)
    angles = values[:, None].float() * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
