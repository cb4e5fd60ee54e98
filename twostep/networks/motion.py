"""A motion module on a picture model: a UNet that draws clips (arXiv 2307.04725, AnimateDiff).

After every layer of a picture UNet stands a transformer along time: at each place of the picture by
itself, every frame attends to all frames. Its last layer starts at zero, so a fresh module draws
every frame as the picture model would. The picture model stays frozen, and what is trained fits
others that were tuned from the same one.

Names of weights are those of diffusers' `MotionAdapter`; AnimateDiff's own are translated by
`formats.motion_files`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from twostep.formats.motion_files import MotionConfig, MotionError, frame_positions
from twostep.networks.adapters import fuse, with_current_adapter
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.domain_adapter import DomainAdapter
from twostep.networks.lean import Inserted, LeanUnet
from twostep.networks.lean.blocks import Attention, FeedForward
from twostep.networks.sdxl_unet import pooled_width_of

Clips = Float[Tensor, "batch c frames h w"]
"""Latents of clips."""

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)
"""Endings of the names of the layers that a LoRA changes: attentions, and the layers after them.

Not the first and the last of a transformer: diffusers 0.42 calls them in a way that PEFT's layers
do not take.
"""

FrameNumbers = Int[Tensor, " frames"]
"""Which frames of a clip are there, rising from 0."""

Times = Shaped[Tensor, " batch"]
"""Times as the UNet reads them, one per clip."""


class TimeBlock(nn.Module):
    """Attention along time, twice, and two layers, each beside what came in.

    Args:
        width: Channels.
        heads: Of each attention.
        max_frames: Positions that there are.
    """

    positions: Tensor

    def __init__(self, width: int, heads: int, max_frames: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width)
        # Computed, so not kept with the weights.
        self.register_buffer("positions", frame_positions(max_frames, width), persistent=False)

    def forward(
        self, x: Float[Tensor, "places frames width"], numbers: FrameNumbers | None = None
    ) -> Tensor:
        """Return vectors of the same shape, of the first frames of a clip or of those numbers."""
        chosen = self.positions[: x.shape[1]] if numbers is None else self.positions[numbers]
        positions = chosen.to(x.dtype)
        x = self.attn1(self.norm1(x) + positions) + x
        x = self.attn2(self.norm2(x) + positions) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class TimeTransformer(nn.Module):
    """What follows one layer of a picture UNet: time blocks at every place by itself.

    Args:
        width: Channels.
        config: Of the motion module.
    """

    def __init__(self, width: int, config: MotionConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TimeBlock(width, config.heads, config.max_frames) for _ in range(config.depth)
        )
        self.proj_out = nn.Linear(width, width)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(
        self,
        x: Float[Tensor, "pictures width h w"],
        num_frames: int,
        numbers: FrameNumbers | None = None,
    ) -> Tensor:
        """Return features of the same shape; the frames of a clip lie one after the other."""
        # What is trained may have another precision than the picture model.
        clips = x.unflatten(0, (-1, num_frames)).transpose(1, 2).to(self.norm.weight.dtype)
        # As in diffusers, a clip is normalised as a whole; AnimateDiff's own code does it frame by
        # frame.
        normed = self.norm(clips)
        places = normed.permute(0, 3, 4, 2, 1)
        hidden = self.proj_in(places.flatten(0, 2))
        for block in self.transformer_blocks:
            hidden = block(hidden, numbers)
        changed = self.proj_out(hidden).view(places.shape).permute(0, 3, 4, 1, 2)
        out: Tensor = x + changed.flatten(0, 1).to(x.dtype)
        return out


class TimeTransformers(nn.Module):
    """Those of one block of a UNet.

    Args:
        width: Channels.
        count: How many.
        config: Of the motion module.
    """

    def __init__(self, width: int, count: int, config: MotionConfig) -> None:
        super().__init__()
        self.motion_modules = nn.ModuleList(TimeTransformer(width, config) for _ in range(count))

    def layers(
        self, num_frames: int, numbers: FrameNumbers | None
    ) -> list[Callable[[Tensor], Tensor]]:
        """Return what a UNet computes after its layers, for clips of so many frames."""
        return [
            partial(module, num_frames=num_frames, numbers=numbers)
            for module in self.motion_modules
        ]


class MotionModule(nn.Module):
    """All that is learned of motion: the transformers along time of every block.

    Args:
        config: Its shape.
    """

    def __init__(self, config: MotionConfig) -> None:
        super().__init__()
        self.shape = config
        self.recompute = False
        widths = config.channels
        self.down_blocks = nn.ModuleList(
            TimeTransformers(width, config.layers, config) for width in widths
        )
        self.mid_block = TimeTransformers(widths[-1], 1, config) if config.has_middle else None
        self.up_blocks = nn.ModuleList(
            TimeTransformers(width, config.layers + 1, config) for width in reversed(widths)
        )

    def inserted(self, num_frames: int, numbers: FrameNumbers | None = None) -> Inserted:
        """Return what is inserted into a UNet for clips of so many frames.

        Where activations are recomputed in the backward pass, another LoRA may be active by then:
        every layer computes with the one that is active now.

        Args:
            num_frames: How many there are.
            numbers: Which of a clip these are; the first ones if not given.

        Raises:
            MotionError: Clips are too long, so that a module knows no positions of them.
        """
        if num_frames > self.shape.max_frames:
            raise MotionError(
                f"{num_frames} frames are too many: this motion module knows 1 to "
                f"{self.shape.max_frames}. Ask for fewer."
            )

        def layers(block: Any) -> list[Callable[[Tensor], Tensor]]:
            computed: list[Callable[[Tensor], Tensor]] = block.layers(num_frames, numbers)
            if not self.recompute:
                return computed
            return [with_current_adapter(self, layer) for layer in computed]

        return Inserted(
            down=[layers(block) for block in self.down_blocks],
            middle=[] if self.mid_block is None else layers(self.mid_block),
            up=[layers(block) for block in self.up_blocks],
        )


@dataclass(frozen=True, eq=False)
class MotionUnet:
    """A motion module on one or several picture UNets, which stay frozen and are never copied.

    Items of a batch may be for different ones (`Conditioning.variants`), so that a module learns
    what holds for all of them (section 3.2 of arXiv 2403.12706).

    Args:
        network: The motion module.
        bases: The picture UNets, of one shape; the first draws.
        names: Of the models that these are from, to find them again.
        adapter: What has been added to the picture UNets so that they know the words of motion.
        numbers: Which frames of a clip are there; the first ones if not given.
    """

    network: MotionModule
    bases: tuple[LeanUnet, ...]
    names: tuple[str, ...] = ()
    adapter: DomainAdapter | None = None
    numbers: FrameNumbers | None = None

    def __post_init__(self) -> None:
        """Refuse a module that does not fit a picture model: MotionError."""
        for base in self.bases:
            check_fit(self.network.shape, base)

    @property
    def spec(self) -> BackboneSpec:
        """The facts about this backbone, from the configs of its parts."""
        return _spec_of(self.bases[0], self.network.shape)

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The picture UNets."""
        return self.bases

    def with_frozen(self, networks: Sequence[LeanUnet]) -> MotionUnet:
        """Return the same motion module on other picture UNets."""
        return replace(self, bases=tuple(networks))

    def __call__(self, x: Clips, time: Times, conditioning: Conditioning) -> Tensor:
        """Return the raw output [batch, c, frames, h, w]."""
        groups = _by_variant(conditioning, len(self.bases))
        outputs = [
            self._drawn(self.bases[variant], *_rows(rows, x, time, conditioning))
            for variant, rows in groups
        ]
        return _in_order(outputs, groups)

    def features(
        self, x: Clips, time: Times, conditioning: Conditioning
    ) -> list[Float[Tensor, "batch _ frames _ _"]]:
        """Return the levels of the way down before they are halved, and the mid-block's output."""
        groups = _by_variant(conditioning, len(self.bases))
        parts = [
            encoded_clips(
                self.bases[variant],
                self.network,
                *_rows(rows, x, time, conditioning),
                numbers=self.numbers,
            )
            for variant, rows in groups
        ]
        return [_in_order(list(levels), groups) for levels in zip(*parts, strict=True)]

    def standalone(self, lora: str | None = None) -> MotionUnet:
        """Return the same with a float32 copy of the motion module, on the same picture models.

        The copy carries no LoRA; the named one is merged into its weights.
        """
        copied = copy.deepcopy(self.network).float()
        fuse(copied, lora)
        return replace(self, network=copied)

    def encoder_copy(self, lora: str | None = None) -> ClipEncoder:
        """Return an encoder of clips to be trained as a whole, which starts as this one."""
        motion = self.standalone(lora).network
        return ClipEncoder(ClipEncoderNetwork(self.bases, motion))

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        self.network.recompute = enabled

    def _drawn(self, base: LeanUnet, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        num_frames = x.shape[2]
        dtype = base.dtype
        pictures, times, text, added = _framewise(x.to(dtype), time, conditioning)
        output: Tensor = base(
            pictures,
            times,
            text,
            added_cond_kwargs=added,
            inserted=self.network.inserted(num_frames, self.numbers),
            recompute=self.network.recompute and torch.is_grad_enabled(),
        )[0]
        clips: Tensor = output.unflatten(0, (-1, num_frames)).transpose(1, 2)
        return clips


class ClipEncoderNetwork(nn.Module):
    """Way down and mid-block of a picture UNet with its motion module, which can all be trained.

    What is judged may have been drawn on several picture models, each with a flow of its own. An
    embedding of which one it was is added to that of the time (section 3.3 of arXiv 2403.12706); it
    starts at zero.

    Args:
        bases: The picture UNets; the first is copied.
        motion: Its way down and middle are taken over.
    """

    def __init__(self, bases: Sequence[LeanUnet], motion: MotionModule) -> None:
        super().__init__()
        first = bases[0]
        self.base = copy.deepcopy(first).float()
        del self.base.up_blocks, self.base.conv_norm_out, self.base.conv_out
        self.motion = motion
        self.motion.up_blocks = nn.ModuleList()
        width = first.time_embedding.linear_2.out_features
        self.variants = nn.Embedding(len(bases), width, device=first.device)
        nn.init.zeros_(self.variants.weight)

    def forward(self, x: Clips, time: Times, conditioning: Conditioning) -> list[Tensor]:
        """Return the features of clips, as `MotionUnet.features` does."""
        numbers = torch.tensor(conditioning.variants or [0] * len(x), device=x.device)
        return encoded_clips(
            self.base, self.motion, x, time, conditioning, beside_time=self.variants(numbers)
        )


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """An encoder of clips as a backbone that offers `features` alone.

    Args:
        network: The encoder.
    """

    network: ClipEncoderNetwork

    @property
    def spec(self) -> BackboneSpec:
        """The facts about this backbone, as those of the `MotionUnet` that it was copied from."""
        return _spec_of(self.network.base, self.network.motion.shape)

    def __call__(self, x: Clips, time: Times, conditioning: Conditioning) -> Tensor:
        """Raise MotionError: there is no way up that would draw."""
        raise MotionError("an encoder of clips has features alone; draw with the MotionUnet.")

    def features(self, x: Clips, time: Times, conditioning: Conditioning) -> list[Tensor]:
        """Return the features of clips, as `MotionUnet.features` does."""
        features: list[Tensor] = self.network(x, time, conditioning)
        return features

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them."""
        self.network.motion.recompute = enabled


def check_fit(shape: MotionConfig, base: Any) -> None:
    """Raise MotionError unless a motion module has the widths and layers of a picture UNet."""
    expected = MotionConfig.on(base.config)
    if (shape.channels, shape.layers) == (expected.channels, expected.layers):
        return
    raise MotionError(
        f"this motion module is for a UNet of {shape}, and the picture model has one of "
        f"{expected}. It was made for another family; take the one for this model, or put it on a "
        "model that it fits."
    )


def encoded_clips(
    base: LeanUnet,
    motion: MotionModule,
    x: Clips,
    time: Times,
    conditioning: Conditioning,
    *,
    numbers: FrameNumbers | None = None,
    beside_time: Float[Tensor, "batch width"] | None = None,
) -> list[Float[Tensor, "batch _ frames _ _"]]:
    """Return what the way down and the mid-block of a picture UNet make of clips.

    Args:
        base: The picture UNet, of which nothing on the way up is used.
        motion: What is inserted.
        x: Noisy latents of clips.
        time: One per clip.
        conditioning: One item per clip.
        numbers: Which frames of the clips these are; the first ones if not given.
        beside_time: What is added to the embedding of the times.
    """
    num_frames = x.shape[2]
    pictures, times, text, added = _framewise(x.to(base.dtype), time, conditioning)
    if beside_time is not None:
        beside_time = beside_time.repeat_interleave(num_frames, dim=0)
    encoded = base.encode(
        pictures,
        times,
        text,
        added,
        inserted=replace(motion.inserted(num_frames, numbers), up=()),
        recompute=motion.recompute and torch.is_grad_enabled(),
        beside_time=beside_time,
    )
    levels = [*encoded.levels, encoded.x]
    return [level.unflatten(0, (-1, num_frames)).transpose(1, 2) for level in levels]


def _spec_of(base: LeanUnet, shape: MotionConfig) -> BackboneSpec:
    config = base.config
    return BackboneSpec(
        family="motion",
        in_channels=int(config.in_channels),
        out_channels=int(config.out_channels),
        latent_ndim=4,
        feature_widths=(*shape.channels, shape.channels[-1]),
        feature_sides=3,
        lora_targets=LORA_TARGETS,
        pooled_width=pooled_width_of(config),
    )


def _framewise(
    x: Tensor, time: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return frames as pictures [batch * frames, c, h, w], and times, text and sizes of each."""
    num_frames = x.shape[2]
    pictures = x.transpose(1, 2).flatten(0, 1)

    def repeated(values: Tensor) -> Tensor:
        return values.repeat_interleave(num_frames, dim=0)

    added = {
        "text_embeds": repeated(conditioning.pooled),
        "time_ids": repeated(conditioning.sizes),
    }
    return pictures, repeated(time), repeated(conditioning.text.to(x.dtype)), added


_Groups = list[tuple[int, list[int]]]


def _by_variant(conditioning: Conditioning, count: int) -> _Groups:
    """Return the picture models that items are for, each with the places of its items."""
    variants = conditioning.variants or (0,) * len(conditioning)
    if max(variants) >= count:
        raise MotionError(
            f"an item is for picture model {max(variants)}, and there are {count}, from 0 up."
        )
    places: dict[int, list[int]] = {}
    for place, variant in enumerate(variants):
        places.setdefault(variant, []).append(place)
    return list(places.items())


def _rows(
    places: list[int], x: Tensor, time: Tensor, conditioning: Conditioning
) -> tuple[Tensor, Tensor, Conditioning]:
    """Return some of the items; all of them as they are."""
    if len(places) == len(x):
        return x, time, conditioning
    rows = torch.tensor(places, device=x.device)
    return x[rows], time[rows], conditioning[rows]


def _in_order(parts: list[Tensor], groups: _Groups) -> Tensor:
    """Put what was computed group by group back into the order of the items."""
    if len(parts) == 1:
        return parts[0]
    places = [place for _, rows in groups for place in rows]
    order = torch.tensor(places).argsort().to(parts[0].device)
    return torch.cat(parts)[order]
