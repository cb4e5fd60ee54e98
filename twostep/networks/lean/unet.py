"""SDXL's UNet (section 2 of arXiv 2307.01952) with the weights' names of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from twostep.networks.lean.blocks import Downsample, Resnet, SpatialTransformer, Upsample
from twostep.networks.lean.config import LeanNetwork, has_entries, per_level
from twostep.networks.recomputing import computed

_CROSS_DOWN = "CrossAttnDownBlock2D"
_CROSS_UP = "CrossAttnUpBlock2D"

_EXPECTED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": ("text_time", None),
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


Layer = Callable[[Tensor], Tensor]
"""What maps features [batch, width, h, w] to others of the same shape."""


@dataclass(frozen=True, eq=False)
class Inserted:
    """What a UNet computes after its own layers, for every block one function a layer.

    A layer is a block of convolutions with the transformer that follows it, if there is one; in the
    middle it is the transformer. Empty where nothing is inserted.

    Args:
        down: For every level on the way down.
        middle: For the mid-block, one.
        up: For every level on the way up, the smallest first.
    """

    down: Sequence[Sequence[Layer]] = ()
    middle: Sequence[Layer] = ()
    up: Sequence[Sequence[Layer]] = ()

    def on_way_down(self, level: int) -> Sequence[Layer]:
        """Return what is inserted into a level, the largest being 0."""
        return self.down[level] if self.down else ()

    def on_way_up(self, position: int) -> Sequence[Layer]:
        """Return what is inserted into a level, the smallest being 0."""
        return self.up[position] if self.up else ()


NOTHING = Inserted()
"""A UNet as it is."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the way down and the middle make of noisy latents.

    Args:
        x: The mid-block's output.
        skips: What is passed on to the way up, in order.
        levels: The output of every level before it is halved.
        time: The embedding of times, and of sizes and pooled text.
    """

    x: Tensor
    skips: list[Tensor]
    levels: list[Tensor]
    time: Tensor


class LeanUnet(LeanNetwork):
    """A UNet that computes what diffusers' computes for the calls that drawing makes.

    Without `addition_embed_type` it is one of Stable Diffusion 1 and 2, which know neither pooled
    text nor sizes.

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
        self.add_embedding = None
        if entries.get("addition_embed_type") is not None:
            width_beside = entries.projection_class_embeddings_input_dim
            self.add_embedding = Embedding(width_beside, time_width)
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
        inserted: Inserted = NOTHING,
        recompute: bool = False,
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
            inserted: What is computed after the layers.
            recompute: Whether layers are computed again in the backward pass, one at a time.
            return_dict: False, as diffusers' callers say it: nothing else is there.
        """
        text = encoder_hidden_states
        encoded = self.encode(
            sample, timestep, text, added_cond_kwargs, inserted=inserted, recompute=recompute
        )
        x = encoded.x
        skips = encoded.skips
        if down_block_additional_residuals:
            pairs = zip(skips, down_block_additional_residuals, strict=True)
            skips = [skip + added for skip, added in pairs]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual
        upper: Any
        for position, upper in enumerate(self.up_blocks):
            taken, skips = skips[-upper.count :], skips[: -upper.count]
            size = skips[-1].shape[-2:] if skips else None
            after = inserted.on_way_up(position)
            x = upper(x, encoded.time, text, taken, size, after, recompute=recompute)
        return (self.conv_out(silu(self.conv_norm_out(x))),)

    def encode(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        added: Mapping[str, Tensor],
        *,
        inserted: Inserted = NOTHING,
        recompute: bool = False,
        beside_time: Tensor | None = None,
    ) -> Encoded:
        """Return what the way down and the middle compute, for which nothing of the way up is used.

        Args:
            sample: As in `forward`, and so are all but the last.
            timestep: Times as the network reads them.
            text: The text [batch, tokens, width].
            added: "text_embeds" and "time_ids".
            inserted: What is computed after the layers.
            recompute: Whether layers are computed again in the backward pass, one at a time.
            beside_time: What is added to the embedding of times [batch, time width].
        """
        time = self._time(sample, timestep, added)
        if beside_time is not None:
            time = time + beside_time
        x = self.conv_in(sample)
        skips = [x]
        levels = []
        for level, block in enumerate(self.down_blocks):
            after = inserted.on_way_down(level)
            x, passed = block(x, time, text, after, recompute=recompute)
            skips += passed
            is_halved = level + 1 < len(self.down_blocks)
            levels.append(passed[-2] if is_halved else passed[-1])
        x = self.mid_block(x, time, text, inserted.middle, recompute=recompute)
        return Encoded(x, skips, levels, time)

    def _time(self, sample: Tensor, timestep: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the embedding of times, sizes and pooled text [batch, time width]."""
        width = self.config.block_out_channels[0]
        waves = sinusoids(timestep.expand(len(sample)), width).to(sample.dtype)
        time: Tensor = self.time_embedding(waves)
        if self.add_embedding is None:
            return time
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

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        after: Sequence[Layer] = (),
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return features, and what is passed on to the way up."""
        passed = []
        for number, resnet in enumerate(self.resnets):
            x = computed(resnet, recompute, x, time)
            x = _after_resnet(x, text, number, self.attentions, after, recompute)
            passed.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            passed.append(x)
        return x, passed


def _after_resnet(
    x: Tensor,
    text: Tensor,
    number: int,
    attentions: nn.ModuleList | None,
    after: Sequence[Layer],
    recompute: bool,
) -> Tensor:
    """Return what the rest of a layer computes: its transformer, and what is inserted."""
    if attentions is not None:
        x = attentions[number](x, text, recompute)
    if after:
        x = computed(after[number], recompute, x)
    return x


class MidBlock(nn.Module):
    """The middle, at the smallest size."""

    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        width = plan.widths[-1]
        self.resnets = nn.ModuleList(plan.resnet(width, width) for _ in range(2))
        self.attentions = plan.transformers(len(plan.widths) - 1, 1)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        after: Sequence[Layer] = (),
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Return features of the same shape."""
        first, second = self.resnets
        x = self.attentions[0](computed(first, recompute, x, time), text, recompute)
        for layer in after:
            x = computed(layer, recompute, x)
        out: Tensor = computed(second, recompute, x, time)
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
        self,
        x: Tensor,
        time: Tensor,
        text: Tensor,
        skips: Sequence[Tensor],
        size: Any,
        after: Sequence[Layer] = (),
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Return features, at the size (h, w) of the next level's skips."""
        for number, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = computed(resnet, recompute, torch.cat([x, skip], dim=1), time)
            x = _after_resnet(x, text, number, self.attentions, after, recompute)
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
