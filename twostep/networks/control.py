"""ControlNets (arXiv 2302.05543): a second encoder that looks at a picture and adds to what a
UNet's own encoder says.

One that was made for a teacher serves its students unchanged. Where pictures come from is unknown
here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor

from twostep.formats.locate import WEIGHTS, ModelError, fetch, read_json, weights_variant

BUILT_IN = {"silhouette": WEIGHTS / "nano" / "controlnet"}
_CONFIG, _EMBEDDING = "config.json", "conditioning_embedding_out_channels"
_ALIKE = (
    *(
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "in_channels",
        "addition_embed_type",
    ),
    *("projection_class_embeddings_input_dim", "pixels_per_latent"),
)
"""What a ControlNet's config must share with that of its UNet."""


@dataclass(frozen=True, eq=False)
class Hint:
    """A ControlNet at work: its network, the picture it looks at in 0..1, how strongly it acts, and
    at which times.
    """

    network: ControlNetModel
    picture: Float[Tensor, "batch 3 height width"]
    scale: float
    times: frozenset[int | float]


def residuals(
    hints: Sequence[Hint], x: Tensor, index: Tensor, text: Tensor, added: dict[str, Tensor]
) -> dict[str, Any]:
    """Return what ControlNets, at least one, together add to a UNet, as its arguments; `index` is
    the time less 1.
    """
    total: list[Tensor] = []
    for hint in hints:
        picture = hint.picture.to(x.dtype)
        down, mid = hint.network(
            x, index, text, picture, hint.scale, added_cond_kwargs=added, return_dict=False
        )
        total = [a + b for a, b in zip(total, (*down, mid), strict=True)] if total else [*down, mid]
    return {
        "down_block_additional_residuals": tuple(total[:-1]),
        "mid_block_additional_residual": total[-1],
    }


def load_control(name: str, unet: UNet2DConditionModel, pixels_per_latent: int) -> ControlNetModel:
    """Load a ControlNet by a built-in name, folder or hub id, where the UNet is and as precise; the
    last few are kept.

    Raises ModelError for what is no ControlNet, or one for another architecture, and says how that
    differs.
    """
    folder = BUILT_IN.get(name, Path(name))
    if not folder.exists() and "/" in name:
        folder = fetch(name, only=("*.json", "*.safetensors"), holding=_CONFIG)
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if config.get("_class_name") != "ControlNetModel":
        kind, known = config.get("_class_name", "no folder of a network"), ", ".join(BUILT_IN)
        expected = f"a ControlNetModel's folder or hub id, or a built-in one: {known}"
        raise ModelError(f"{folder} is {kind}. Expected {expected}.")
    own = {"in_channels": 4, **config, "pixels_per_latent": 2 ** (len(config[_EMBEDDING]) - 1)}
    wanted = {
        **unet.config,
        "in_channels": unet.config.out_channels,
        "pixels_per_latent": pixels_per_latent,
    }
    said = {key: (json.dumps(own.get(key)), json.dumps(wanted[key])) for key in _ALIKE}
    if wrong := [
        f"{key} {has}, expected {needs}" for key, (has, needs) in said.items() if has != needs
    ]:
        raise ModelError(
            f"{folder} is a ControlNet for another model: {'; '.join(wrong)}. Use one made for this."
        )
    return _load(folder.resolve(), unet.device, unet.dtype)


@lru_cache(maxsize=4)
def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> ControlNetModel:
    form = {"torch_dtype": dtype, "variant": weights_variant(folder)}
    network = ControlNetModel.from_pretrained(folder, use_safetensors=True, **form)
    return network.to(device).eval().requires_grad_(False)
