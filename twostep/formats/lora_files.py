"""LoRA files in every dialect: which tensor belongs to which layer, read and written without losing
a key.

W' = W + alpha / rank * up down. Layers are called `unet.X`, `text_encoder.X` or `text_encoder_2.X`,
X being the network's own name for it. In files PEFT adds `.lora_A` and `.lora_B`, early diffusers
`.lora.down` and `.lora.up`; kohya writes `lora_unet_X.lora_down`, with dots as underlines and X
after diffusers or after the first latent diffusion code. The last is what all programs read. All
names follow from the networks, so small models have them too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.formats.identify import kind_of, read_header
from twostep.formats.ldm_names import unet_names
from twostep.formats.locate import ModelError

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
"""The parts of a model -> what kohya puts before the names of their layers."""

DIALECTS = {
    "peft": (0, "lora_A", "lora_B"),
    "early": (0, "lora.down", "lora.up"),
    "kohya-diffusers": (1, "lora_down", "lora_up"),
    "kohya": (2, "lora_down", "lora_up"),
}
"""Which name a dialect has for a layer (see `_spelled`), and what it calls the halves."""

_KEY = re.compile(
    r"(.+?)\.(?:(lora_A|lora\.down|lora_linear_layer\.down|lora_down)|(lora_B|lora\.up|lora_linear_layer\.up|lora_up))"
    r"\.weight|(.+)\.alpha"
)


class LoraError(ModelError):
    """An adapter that is not there, a file that is none, or weights that do not fit."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a LoRA does to one layer: it adds alpha / rank * up down to the weight."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return len(self.down)

    @property
    def change(self) -> Tensor:
        """What is added, as a float32 matrix [out, in * kernel]."""
        product: Tensor = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.alpha / self.rank * product


def read_lora(
    path: Path, parts: Mapping[str, nn.Module], *, alpha: float | None = None
) -> dict[str, LowRank]:
    """Read what a file does to which layer of these networks, in its precision; every key of it is
    accounted for.

    Alpha is what the file says of the layer, else what is given, else the rank. LoraError says what
    the file is, or which key no layer has, lacks its other half, or has another shape.
    """
    tensors, told = _open(path)
    layers = {said: layer for layer, names in _spelled(parts).items() for said in names}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        layer = layers.get(match[1] or match[4]) if match else None
        if match is None or layer is None:
            what = kind_of(read_header(path))
            raise LoraError(
                f"{path} is {what}: it has {key}, and no layer of {', '.join(parts)} is called so."
            )
        kind = "down" if match[2] else "up" if match[3] else "alpha"
        if kind in found.setdefault(layer, {}):
            raise LoraError(
                f"{path} mixes dialects: {key} is there a second time under another name."
            )
        found[layer][kind] = value
    if not found:
        raise LoraError(f"{path} is empty.")
    lora = {}
    for layer, has in found.items():
        weight = find_layer(parts, layer).weight
        _check(path, layer, has, weight)
        own = (
            has["alpha"].item()
            if "alpha" in has
            else told.get(layer, told.get(layer.partition(".")[0], alpha))
        )
        down = has["down"].reshape(-1, *weight.shape[1:])
        up = has["up"].reshape(len(weight), -1, *[1] * (weight.dim() - 2))
        lora[layer] = LowRank(down, up, float(len(down) if own is None else own))
    return lora


@torch.no_grad()
def merge_lora(
    lora: Mapping[str, LowRank], parts: Mapping[str, nn.Module], *, weight: float = 1.0
) -> None:
    """Add a LoRA, so strongly, to the weights of these networks, in place."""
    for name, low in lora.items():
        target = find_layer(parts, name).weight
        target += (weight * low.change).reshape(target.shape).to(target)


def write_lora(
    lora: Mapping[str, LowRank], parts: Mapping[str, nn.Module], dialect: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a LoRA as a file's tensors and metadata in one of `DIALECTS`, each half bit for bit;
    LoraError.
    """
    if dialect not in DIALECTS:
        raise LoraError(f"There is no dialect {dialect!r}; there are {', '.join(DIALECTS)}.")
    tensors, told, names = dict[str, Tensor](), dict[str, Any](), _spelled(parts)
    for layer, low in lora.items():
        (place, down, up), (part, _, own) = DIALECTS[dialect], layer.partition(".")
        name = names[layer][place]
        if dialect == "early" and part != "unet":
            down, up = "lora_linear_layer.down", "lora_linear_layer.up"
        tensors |= {f"{name}.{down}.weight": low.down, f"{name}.{up}.weight": low.up}
        if dialect == "early" and low.alpha != low.rank:
            raise LoraError(
                f"Early files have no alpha, and {layer} has {low.alpha:g} at rank {low.rank}. Use peft."
            )
        if place:
            # kohya's own have it in the precision of the rest
            exact = torch.tensor(low.alpha, dtype=low.down.dtype)
            tensors[f"{name}.alpha"] = (
                exact if exact.item() == low.alpha else torch.tensor(low.alpha)
            )
        rank, alpha = (
            told.setdefault(f"{part}.r", low.rank),
            told.setdefault(f"{part}.lora_alpha", low.alpha),
        )
        told.setdefault(f"{part}.target_modules", []).append(own)
        told.setdefault(f"{part}.rank_pattern", {}).update(
            {own: low.rank} if low.rank != rank else {}
        )
        told.setdefault(f"{part}.alpha_pattern", {}).update(
            {own: low.alpha} if low.alpha != alpha else {}
        )
    if not dialect.startswith("kohya"):
        return tensors, {"lora_adapter_metadata": json.dumps(told)} if dialect == "peft" else {}
    first = next(iter(lora.values()))
    known = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    return tensors, known | {
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
    }


def _spelled(parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return by layer all its names in files, without what tells the halves apart; those to write
    come first.
    """
    spelled = {}
    for part, network in parts.items():
        layers = [  # those that can have a LoRA, as they are called without those that are on them
            name.removesuffix(".base_layer")
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
        ]
        old = unet_names([f"{layer}.weight" for layer in layers]) if part == "unet" else {}
        for layer in layers:
            # transformers dropped the first word of CLIP's names; files keep it.
            full = (
                layer
                if part == "unet" or layer.startswith("text_model.")
                else f"text_model.{layer}"
            )
            before = old.get(f"{layer}.weight", full).removesuffix(".weight")
            names = [
                f"{part}.{full}",
                *(KOHYA[part] + name.replace(".", "_") for name in (full, before, layer)),
            ]
            # as PEFT saves a network by itself
            alone = [f"base_model.model.{layer}"] if part == "unet" else []
            spelled[f"{part}.{layer}"] = [*names, f"{part}.{layer}", f"{part}.{before}", *alone]
    return spelled


def find_layer(parts: Mapping[str, nn.Module], name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer that a LoRA names, as it is without those that are on it."""
    part, _, layer = name.partition(".")
    found = parts[part].get_submodule(layer)
    base = getattr(found, "base_layer", found)
    assert isinstance(base, nn.Linear | nn.Conv2d)
    return base


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a file's tensors, and the alphas that diffusers writes into its metadata, by layer or
    by part.
    """
    try:
        told = json.loads(read_header(path).metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise LoraError(
            f"{path}: its lora_adapter_metadata is damaged ({error}). Fetch or export it again."
        ) from error
    alphas = {}
    for part in KOHYA:
        if f"{part}.lora_alpha" in told:
            alphas[part] = float(told[f"{part}.lora_alpha"])
        alphas |= {
            f"{part}.{layer}": float(alpha)
            for layer, alpha in told.get(f"{part}.alpha_pattern", {}).items()
        }
    return load_file(path), alphas


def _check(path: Path, layer: str, has: Mapping[str, Tensor], weight: Tensor) -> None:
    if missing := [half for half in ("down", "up") if half not in has]:
        raise LoraError(f"{path} lacks the {missing[0]} half of {layer}. Fetch or export it again.")
    down, up, wide = has["down"], has["up"], weight.flatten(1)
    if (len(up), down.flatten(1).shape[1], len(down)) != (*wide.shape, up.flatten(1).shape[1]):
        halves = f"its halves are {list(up.shape)} and {list(down.shape)}. It was made for a model of another kind"
        raise LoraError(f"{path} does not fit: {layer} is {list(weight.shape)}, and {halves}.")
