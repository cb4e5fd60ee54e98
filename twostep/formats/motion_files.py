"""Files of motion modules: their config, and their weights by the names of other programs.

Names here, and those of diffusers' `MotionAdapter`, are alike but for the positions, which
diffusers keeps with the weights and which are computed here. AnimateDiff's own files, which ComfyUI
reads, name the same weights otherwise; both are read whichever they have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.errors import TwostepError

_POSITIONS = re.compile(r"\.(pos_embed|attention_blocks\.\d+\.pos_encoder)\.pe$")
_NORM = re.compile(r"down_blocks\.(?P<level>\d+)\.motion_modules\.(?P<layer>\d+)\.norm\.weight")
_FIRST_BLOCK = re.compile(
    r"down_blocks\.0\.motion_modules\.0\.transformer_blocks\.(?P<number>\d+)\.norm1\.weight"
)
_MODULE = re.compile(r"(\.motion_modules\.\d+)\.")
_MARK = ".temporal_transformer"

_ANIMATEDIFF = {
    ".norm1.": ".norms.0.",
    ".norm2.": ".norms.1.",
    ".norm3.": ".ff_norm.",
    ".attn1.": ".attention_blocks.0.",
    ".attn2.": ".attention_blocks.1.",
}
"""Parts of names here, and what AnimateDiff calls them."""

_FAMILIES = {
    (320, 640, 1280, 1280): " (Stable Diffusion 1.5)",
    (320, 640, 1280): " (SDXL)",
}
"""The widths of the families that have public motion modules."""


class MotionError(TwostepError):
    """A motion module that does not fit, or clips that are too long for it."""


@dataclass(frozen=True)
class MotionConfig:
    """What a motion module is made of; the defaults are AnimateDiff's for Stable Diffusion 1.5.

    Args:
        channels: Widths of the UNet's levels, the largest first.
        layers: Layers of every level on the way down; one more on the way up.
        depth: Transformer blocks of every layer.
        heads: Of each attention.
        groups: Of the norms.
        max_frames: The longest clip.
        has_middle: Whether the mid-block has one too; AnimateDiff's for SDXL has not.
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    depth: int = 1
    heads: int = 8
    groups: int = 32
    max_frames: int = 32
    has_middle: bool = True

    @classmethod
    def on(cls, unet: Mapping[str, Any], **others: Any) -> MotionConfig:
        """Return the config that fits a picture UNet, by the config of that one."""
        return cls(
            channels=tuple(unet["block_out_channels"]),
            layers=int(unet["layers_per_block"]),
            groups=int(unet["norm_num_groups"]),
            **others,
        )

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor], **others: Any) -> MotionConfig:
        """Return the config that weights show, whichever names they have.

        Heads and groups do not show; they are AnimateDiff's unless given. Raises MotionError for
        weights that are no motion module.
        """
        shapes = {name: tuple(value.shape) for name, value in our_names(weights).items()}
        widths: dict[int, int] = {}
        layers = 0
        depth = 0
        for name, shape in shapes.items():
            match = _NORM.fullmatch(name)
            if match is not None:
                widths[int(match["level"])] = shape[0]
                layers = max(layers, int(match["layer"]) + 1)
            block = _FIRST_BLOCK.fullmatch(name)
            if block is not None:
                depth = max(depth, int(block["number"]) + 1)
        if not widths or sorted(widths) != list(range(len(widths))):
            raise MotionError(
                "this is no motion module: expected names such as "
                "down_blocks.0.motion_modules.0.norm.weight, or AnimateDiff's own."
            )
        known = [value.shape[-2] for name, value in weights.items() if _POSITIONS.search(name)]
        if known:
            others = {"max_frames": int(min(known)), **others}
        return cls(
            channels=tuple(widths[level] for level in range(len(widths))),
            layers=layers,
            depth=depth,
            has_middle=any(name.startswith("mid_block.") for name in shapes),
            **others,
        )

    def __str__(self) -> str:
        """Return widths and layers in words."""
        widths = ", ".join(map(str, self.channels))
        plural = "" if self.layers == 1 else "s"
        family = _FAMILIES.get(self.channels, "")
        return f"{widths} channels with {self.layers} layer{plural} a level{family}"

    def to_diffusers(self) -> dict[str, Any]:
        """Return the config of diffusers' `MotionAdapter` of the same shape."""
        return {
            "_class_name": "MotionAdapter",
            "block_out_channels": list(self.channels),
            "motion_layers_per_block": self.layers,
            "motion_transformer_layers_per_block": self.depth,
            "motion_transformer_layers_per_mid_block": self.depth,
            "motion_num_attention_heads": self.heads,
            "motion_norm_num_groups": self.groups,
            "motion_max_seq_length": self.max_frames,
            "use_motion_mid_block": self.has_middle,
        }

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> MotionConfig:
        """Read such a config; raises MotionError for one of a shape that is not known here."""
        default = cls()
        try:
            read = cls(
                channels=tuple(config["block_out_channels"]),
                layers=_single(config.get("motion_layers_per_block", default.layers)),
                depth=_single(config.get("motion_transformer_layers_per_block", default.depth)),
                heads=_single(config.get("motion_num_attention_heads", default.heads)),
                groups=int(config.get("motion_norm_num_groups", default.groups)),
                max_frames=int(config.get("motion_max_seq_length", default.max_frames)),
                has_middle=bool(config.get("use_motion_mid_block", default.has_middle)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise MotionError(
                f"this config of a motion module cannot be read ({error}); expected that of "
                "diffusers' MotionAdapter, with the same numbers at every level."
            ) from error
        if config.get("conv_in_channels") is not None:
            raise MotionError(
                "this motion module has a first convolution of its own (PIA), which is not "
                "supported; take an AnimateDiff one."
            )
        return read


def _single(value: Any) -> int:
    """Return the one number that a config says, or repeats for every level."""
    numbers = {value} if isinstance(value, int) else set(value)
    if len(numbers) != 1:
        raise ValueError(f"{value} differs from level to level")
    return int(numbers.pop())


def frame_positions(count: int, width: int) -> Float[Tensor, "count width"]:
    """Return sines and cosines of frame numbers in turns (section 3.5 of arXiv 1706.03762)."""
    numbers = torch.arange(count, dtype=torch.float32)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000) / width))
    positions = torch.zeros(count, width)
    positions[:, 0::2] = torch.sin(numbers * rates)
    positions[:, 1::2] = torch.cos(numbers * rates)[:, : width // 2]
    return positions


def our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file by the names here, without positions.

    Whether the names are diffusers' or AnimateDiff's, and whether or not a training with several
    processes left its prefix.
    """
    renamed = {}
    for name, value in weights.items():
        if _POSITIONS.search(name):
            continue
        name = name.removeprefix("module.").replace(_MARK, "")
        for ours, theirs in _ANIMATEDIFF.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def to_diffusers(weights: Mapping[str, Tensor], config: MotionConfig) -> dict[str, Tensor]:
    """Return the weights of a motion module as diffusers' `MotionAdapter` reads them."""
    return {**weights, **_positions(weights, config, (".pos_embed.pe",))}


def to_animatediff(weights: Mapping[str, Tensor], config: MotionConfig) -> dict[str, Tensor]:
    """Return the weights of a motion module by AnimateDiff's own names."""
    places = tuple(f".attention_blocks.{number}.pos_encoder.pe" for number in range(2))
    named = {**weights, **_positions(weights, config, places)}
    return {animatediff_name(name): value for name, value in named.items()}


def animatediff_name(name: str) -> str:
    """Return AnimateDiff's own name of a weight or a layer; others stay as they are."""
    name = _MODULE.sub(rf"\1{_MARK}.", name)
    for ours, theirs in _ANIMATEDIFF.items():
        name = name.replace(ours, theirs)
    return name


def _positions(
    weights: Mapping[str, Tensor], config: MotionConfig, endings: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the positions of every block, under its name with each of the endings."""
    positions: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(".norm1.weight"):
            known = frame_positions(config.max_frames, len(value))[None]
            block = name.removesuffix(".norm1.weight")
            positions |= {f"{block}{ending}": known.clone() for ending in endings}
    return positions
