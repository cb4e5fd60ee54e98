"""ControlNets (arXiv 2302.05543): second encoders that look at a picture and add to a UNet's own.

A ControlNet that was made for a teacher serves its students unchanged.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from twostep.formats.header import read_header
from twostep.formats.identify import CONTROL, kind_of
from twostep.formats.locate import (
    WEIGHTS,
    ModelError,
    fetch,
    hub_id,
    read_json,
    weights_variant,
)
from twostep.formats.single_file import account

BUILT_IN = {"silhouette": WEIGHTS / "nano" / "controlnet"}
"""Folders of the ControlNets that come with the package, by name."""

SHARED_CONFIG = (
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "in_channels",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "pixels_per_latent",
)
"""What a ControlNet's config must share with that of its UNet."""

_CONFIG = "config.json"

_EMBEDDING = "controlnet_cond_embedding"
"""What the picture goes through first; only ControlNets by diffusers' names have it."""

_TRANSFORMER = r"attentions\.0\.transformer_blocks\.(\d+)\."

_EXPECTED = (
    "Expected a ControlNetModel's folder, its .safetensors by diffusers' names, a hub id, or a "
    f"built-in one: {', '.join(BUILT_IN)}."
)


@dataclass(frozen=True, eq=False)
class Hint:
    """A ControlNet at work.

    Args:
        network: The ControlNet.
        picture: What it looks at, in 0..1.
        scale: How strongly it acts; 1 is as it was trained, 0 not at all.
        times: The times at which it acts.
    """

    network: Any
    picture: Float[Tensor, "batch 3 height width"]
    scale: float
    times: frozenset[int | float]

    def acts_at(self, time: float) -> bool:
        """Whether it acts at a time, which may be rounded to single precision."""
        return time in self.times or any(
            math.isclose(time, listed, rel_tol=1e-6) for listed in self.times
        )


def residuals(
    hints: Sequence[Hint], x: Tensor, time: Tensor, text: Tensor, embedded: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what ControlNets together add to a UNet, as arguments of its forward pass.

    Args:
        hints: The ControlNets that act, at least one.
        x: Noisy latents [batch, channels, h, w].
        time: Times as the UNet reads them, 0 to 999, one per item.
        text: Text embeddings [batch, tokens, width].
        embedded: What the UNet embeds together with the time.
    """
    total: list[Tensor] = []
    for hint in hints:
        down, middle = hint.network(
            x,
            time,
            text,
            controlnet_cond=hint.picture.to(x.dtype),
            conditioning_scale=hint.scale,
            added_cond_kwargs=embedded,
            return_dict=False,
        )
        added = [*down, middle]
        if total:
            added = [before + after for before, after in zip(total, added, strict=True)]
        total = added
    return {
        "down_block_additional_residuals": tuple(total[:-1]),
        "mid_block_additional_residual": total[-1],
    }


def load_control(name: str, unet: Any, pixels_per_latent: int) -> Any:
    """Load a ControlNet, on the UNet's device and in its precision; the last four are kept.

    Args:
        name: A built-in name, a folder, a .safetensors file by diffusers' names, or a hub id.
        unet: The UNet that it is to act on.
        pixels_per_latent: Pixels along each side of one latent.

    Raises:
        ModelError: If there is no ControlNet, or it was made for another architecture; the message
            lists the differences.
    """
    if not hasattr(unet, "config") or "cross_attention_dim" not in unet.config:
        raise ModelError(
            f"ControlNets act on SDXL's UNet; this model has a {type(unet).__name__}. "
            "Draw without a ControlNet, or with an SDXL model."
        )
    folder = _control_folder(name)
    if folder.is_file():
        return _from_file(folder, unet, pixels_per_latent)
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if config.get("_class_name") != "ControlNetModel":
        kind = config.get("_class_name", "no folder of a network")
        raise ModelError(f"{folder} is {kind}. {_EXPECTED}")
    differences = _differences(config, unet, pixels_per_latent)
    if differences:
        raise ModelError(
            f"{folder} is a ControlNet for another model: {'; '.join(differences)}. "
            "Use one made for this."
        )
    return _load(folder.resolve(), unet.device, unet.dtype)


def _control_folder(name: str) -> Path:
    """Return the local folder of a ControlNet, fetched from the hub if it is a hub id."""
    folder = BUILT_IN.get(name, Path(name))
    repository = hub_id(name)
    if folder.exists() or repository is None:
        return folder
    return fetch(repository, only=("*.json", "*.safetensors"), holding=_CONFIG)


def _differences(config: dict[str, Any], unet: Any, pixels_per_latent: int) -> list[str]:
    """Say where a ControlNet's config differs from what its UNet needs."""
    # The picture is halved once between two neighbouring widths of its embedding.
    halvings = len(config["conditioning_embedding_out_channels"]) - 1
    given = {"in_channels": 4, **config, "pixels_per_latent": 2**halvings}
    # A ControlNet takes latents alone, also where the UNet takes a mask too.
    needed = {
        **unet.config,
        "in_channels": unet.config.out_channels,
        "pixels_per_latent": pixels_per_latent,
    }
    differences = []
    for key in SHARED_CONFIG:
        has = json.dumps(given.get(key))
        needs = json.dumps(needed[key])
        if has != needs:
            differences.append(f"{key} {has}, expected {needs}")
    return differences


def _from_file(path: Path, unet: Any, pixels_per_latent: int) -> Any:
    """Load a ControlNet from one file, which has no config.

    What its layers are is read off the names and shapes of its weights, everything else is as in
    the UNet that it acts on.
    """
    header = read_header(path)
    kind = kind_of(header)
    if kind.what != CONTROL or not header.has(_EMBEDDING):
        known = f"{kind}, {kind.names} names" if kind.names else str(kind)
        raise ModelError(f"{path} is {known}. {_EXPECTED}")
    config = {**unet.config, **_layers(header.shapes)}
    config["in_channels"] = unet.config.out_channels
    differences = _differences(config, unet, pixels_per_latent)
    if differences:
        raise ModelError(
            f"{path} is a ControlNet for another model: {'; '.join(differences)}. "
            "Use one made for this."
        )
    return _load_file(path.resolve(), _Config(config), unet.device, unet.dtype)


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what the names and shapes of a ControlNet's weights say of its config."""
    stages = [shapes[f"{_EMBEDDING}.conv_in.weight"][0]]
    while (second := f"{_EMBEDDING}.blocks.{2 * len(stages) - 1}.weight") in shapes:
        stages.append(shapes[second][0])
    layers: dict[str, Any] = {"conditioning_embedding_out_channels": stages}
    num_blocks = _count(shapes, r"down_blocks\.(\d+)\.")
    blocks = [f"down_blocks.{i}" for i in range(num_blocks)]
    depths = [_count(shapes, rf"{re.escape(each)}\.{_TRANSFORMER}") for each in blocks]
    middle = _count(shapes, rf"mid_block\.{_TRANSFORMER}")
    layers["down_block_types"] = [
        "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths
    ]
    layers["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    # The middle has the depth of the last block, which may have no attention itself.
    layers["transformer_layers_per_block"] = [*(depth or 1 for depth in depths[:-1]), middle or 1]
    layers["layers_per_block"] = _count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    layers["block_out_channels"] = [
        shapes.get(f"{each}.resnets.0.conv1.weight", (0,))[0] for each in blocks
    ]
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight"):
            layers["cross_attention_dim"] = shape[1]
        if name.endswith("attentions.0.proj_in.weight"):
            # Written as a linear layer, or as a convolution of 1x1.
            layers["use_linear_projection"] = len(shape) == 2
    return layers


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Return how many numbers a pattern has among names that begin with it: the largest and one."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


class _Config(dict[str, Any]):
    """A config that can be remembered by: every network is made by equal ones alike."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=str))


@lru_cache(maxsize=4)
def _load_file(path: Path, config: _Config, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    known = inspect.signature(ControlNetModel.__init__).parameters
    arguments = {key: value for key, value in config.items() if key in known}
    with torch.device("meta"):
        network = ControlNetModel(**arguments)
    expected = network.state_dict()
    accounted = account(load_file(path), expected, {key: key for key in expected}, str(path))
    network.load_state_dict(accounted, assign=True)
    return network.to(device, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import ControlNetModel

    network = ControlNetModel.from_pretrained(
        folder, use_safetensors=True, torch_dtype=dtype, variant=weights_variant(folder)
    )
    return network.to(device).eval().requires_grad_(False)
