"""LoRA files in every dialect: read, merged and written without losing a key.

A LoRA changes the weights of layers to W' = W + alpha / rank * up down (arXiv 2106.09685). Here its
layers are called `unet.X`, `text_encoder.X` or `text_encoder_2.X`, X being the network's own name.
In files PEFT adds `.lora_A` and `.lora_B`, early diffusers `.lora.down` and `.lora.up`; kohya
writes `lora_unet_X.lora_down`, with underscores for dots, and X after diffusers or after the first
latent diffusion code. The last is what all programs read. All names follow from the networks, so
that small models have them too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.header import Header
from twostep.formats.identify import kind_of
from twostep.formats.ldm_names import unet_names
from twostep.formats.locate import ModelError

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
"""What kohya puts before the names of the layers of each part."""


@dataclass(frozen=True)
class Dialect:
    """How a program names a LoRA's tensors.

    `place` is the position of its name for a layer in what `_layer_names` lists; `down` and `up`
    are its words for the halves. `text_down` and `text_up` are those of text encoders, if others.
    """

    place: int
    down: str
    up: str
    has_alpha: bool = False
    text_down: str | None = None
    text_up: str | None = None


DIALECTS = {
    "peft": Dialect(0, "lora_A", "lora_B"),
    "early": Dialect(
        0,
        "lora.down",
        "lora.up",
        text_down="lora_linear_layer.down",
        text_up="lora_linear_layer.up",
    ),
    "kohya-diffusers": Dialect(1, "lora_down", "lora_up", has_alpha=True),
    "kohya": Dialect(2, "lora_down", "lora_up", has_alpha=True),
}
"""The dialects that can be written; all of them are read."""

_KEY = re.compile(
    r"(?P<layer>.+?)\."
    r"(?:(?P<down>lora_A|lora\.down|lora_linear_layer\.down|lora_down)"
    r"|(?P<up>lora_B|lora\.up|lora_linear_layer\.up|lora_up))\.weight"
    r"|(?P<alpha>.+)\.alpha"
)
"""A key of a LoRA's file: a half of a layer, or its alpha."""


class LoraError(ModelError):
    """A LoRA that is missing, a file that is none, or weights that do not fit."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a LoRA does to one layer: it adds alpha / rank * up down to the weight.

    `down` has the shape [rank, in, ...], `up` [out, rank, ...].
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return len(self.down)

    @property
    def change(self) -> Tensor:
        """The matrix [out, in * kernel] that is added, in float32."""
        product: Tensor = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.alpha / self.rank * product


def read_lora(
    lora: Checkpoint | str | Path, parts: Mapping[str, nn.Module], *, alpha: float | None = None
) -> dict[str, LowRank]:
    """Read what a LoRA does to the layers of networks.

    Arguments:
        lora: the file, whose header is read only if it is not given as a checkpoint.
        parts: the networks, by the names of `KOHYA`.
        alpha: the alpha of layers for which the file has none; their rank by default.

    Returns the change of each layer in the file's precision, by part and layer ("unet.conv_in").
    Raises LoraError, with what the file is, if a key has no layer, a layer lacks a half, or its
    shape does not fit.
    """
    header = resolve(lora).file
    default_alphas = _default_alphas(header)
    changes = {}
    for name, tensors in _collect(header, parts).items():
        weight = find_layer(parts, name).weight
        down, up = _halves(header.path, name, tensors, weight)
        part = name.partition(".")[0]
        layer_alpha = default_alphas.get(name, default_alphas.get(part, alpha))
        if "alpha" in tensors:
            layer_alpha = tensors["alpha"].item()
        changes[name] = LowRank(
            down=down.reshape(-1, *weight.shape[1:]),
            up=up.reshape(len(weight), -1, *[1] * (weight.dim() - 2)),
            alpha=float(len(down) if layer_alpha is None else layer_alpha),
        )
    return changes


def _collect(header: Header, parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Read all tensors of a file: "down", "up" and "alpha" of every layer that it changes."""
    layers_by_name: dict[str, str] = {}
    for name, names in _layer_names(parts).items():
        layers_by_name |= dict.fromkeys(names, name)
    collected: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(header.path).items():
        match = _KEY.fullmatch(key)
        layer = layers_by_name.get(match["layer"] or match["alpha"]) if match else None
        if match is None or layer is None:
            raise LoraError(
                f"{header.path} is {kind_of(header)}: it has {key}, and no layer of "
                f"{', '.join(parts)} is called so."
            )
        role = next(role for role in ("down", "up", "alpha") if match[role])
        tensors = collected.setdefault(layer, {})
        if role in tensors:
            raise LoraError(
                f"{header.path} mixes dialects: {key} is there a second time under another name."
            )
        tensors[role] = value
    if not collected:
        raise LoraError(f"{header.path} is empty.")
    return collected


def _default_alphas(header: Header) -> dict[str, float]:
    """Return the alphas that diffusers writes into the metadata, by layer or by part."""
    try:
        metadata = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise LoraError(
            f"{header.path}: its lora_adapter_metadata is damaged ({error}). "
            "Fetch or export it again."
        ) from error
    alphas = {}
    for part in KOHYA:
        if f"{part}.lora_alpha" in metadata:
            alphas[part] = float(metadata[f"{part}.lora_alpha"])
        for layer, alpha in metadata.get(f"{part}.alpha_pattern", {}).items():
            alphas[f"{part}.{layer}"] = float(alpha)
    return alphas


def _halves(
    path: Path, name: str, tensors: Mapping[str, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return both halves of a layer; raises LoraError unless their product fits its weight."""
    for half in ("down", "up"):
        if half not in tensors:
            raise LoraError(f"{path} lacks the {half} half of {name}. Fetch or export it again.")
    down = tensors["down"]
    up = tensors["up"]
    rows, columns = weight.flatten(1).shape
    rank = len(down)
    fits_down = down.flatten(1).shape[1] == columns
    fits_up = len(up) == rows and up.flatten(1).shape[1] == rank
    if not fits_down or not fits_up:
        raise LoraError(
            f"{path} does not fit: {name} is {list(weight.shape)}, and its halves are "
            f"{list(up.shape)} and {list(down.shape)}. It was made for a model of another kind."
        )
    return down, up


@torch.no_grad()
def merge_lora(
    lora: Mapping[str, LowRank], parts: Mapping[str, nn.Module], *, weight: float = 1.0
) -> None:
    """Add `weight` times the change of a LoRA to the weights of networks, in place."""
    for name, low_rank in lora.items():
        target = find_layer(parts, name).weight
        target += (weight * low_rank.change).reshape(target.shape).to(target)


def write_lora(
    lora: Mapping[str, LowRank], parts: Mapping[str, nn.Module], dialect: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a LoRA's file in one of `DIALECTS`.

    Both halves stay bit for bit. Raises LoraError for an unknown dialect, and for early diffusers
    if an alpha is not the rank.
    """
    if dialect not in DIALECTS:
        raise LoraError(f"There is no dialect {dialect!r}; there are {', '.join(DIALECTS)}.")
    words = DIALECTS[dialect]
    names = _layer_names(parts)
    tensors: dict[str, Tensor] = {}
    for layer, low_rank in lora.items():
        if dialect == "early" and low_rank.alpha != low_rank.rank:
            raise LoraError(
                f"Early files have no alpha, and {layer} has {low_rank.alpha:g} at rank "
                f"{low_rank.rank}. Use peft."
            )
        name = names[layer][words.place]
        is_text = not layer.startswith("unet.")
        down = words.text_down if is_text and words.text_down else words.down
        up = words.text_up if is_text and words.text_up else words.up
        tensors[f"{name}.{down}.weight"] = low_rank.down
        tensors[f"{name}.{up}.weight"] = low_rank.up
        if words.has_alpha:
            tensors[f"{name}.alpha"] = _alpha_tensor(low_rank)
    if words.has_alpha:
        return tensors, _kohya_metadata(lora)
    if dialect == "peft":
        return tensors, {"lora_adapter_metadata": json.dumps(_peft_metadata(lora))}
    return tensors, {}


def _alpha_tensor(low_rank: LowRank) -> Tensor:
    """Return alpha in the precision of the halves, as kohya keeps it, or in float32 to be exact."""
    alpha = torch.tensor(low_rank.alpha, dtype=low_rank.down.dtype)
    return alpha if alpha.item() == low_rank.alpha else torch.tensor(low_rank.alpha)


def _kohya_metadata(lora: Mapping[str, LowRank]) -> dict[str, str]:
    first = next(iter(lora.values()))
    return {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
    }


@dataclass
class _PeftPart:
    """The adapter of one network as PEFT describes it; patterns hold what differs from the rest."""

    r: int
    lora_alpha: float
    target_modules: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)


def _peft_metadata(lora: Mapping[str, LowRank]) -> dict[str, Any]:
    """Return what diffusers writes of ranks and alphas; the first layer of a part is the rule."""
    described: dict[str, _PeftPart] = {}
    for layer, low_rank in lora.items():
        part, _, name = layer.partition(".")
        adapter = described.setdefault(part, _PeftPart(low_rank.rank, low_rank.alpha))
        adapter.target_modules.append(name)
        if low_rank.rank != adapter.r:
            adapter.rank_pattern[name] = low_rank.rank
        if low_rank.alpha != adapter.lora_alpha:
            adapter.alpha_pattern[name] = low_rank.alpha
    metadata = {}
    for part, adapter in described.items():
        for key, value in vars(adapter).items():
            metadata[f"{part}.{key}"] = value
    return metadata


def _layer_names(parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return by layer all names that files have for it, without the word for the half.

    The first three are diffusers' name, kohya's after diffusers, and kohya's after the first latent
    diffusion code: the ones that `DIALECTS` write.
    """
    names = {}
    for part, network in parts.items():
        layers = _layers_for_lora(network)
        old = unet_names([f"{layer}.weight" for layer in layers]) if part == "unet" else {}
        for layer in layers:
            full = layer
            if part != "unet" and not layer.startswith("text_model."):
                # Newer transformers dropped the first word of CLIP's names; files keep it.
                full = f"text_model.{layer}"
            before = old.get(f"{layer}.weight", full).removesuffix(".weight")
            kohya = [KOHYA[part] + name.replace(".", "_") for name in (full, before, layer)]
            names[f"{part}.{layer}"] = [f"{part}.{full}", *kohya, f"{part}.{layer}"]
            names[f"{part}.{layer}"].append(f"{part}.{before}")
            if part == "unet":  # as PEFT saves a network by itself
                names[f"{part}.{layer}"].append(f"base_model.model.{layer}")
    return names


def _layers_for_lora(network: nn.Module) -> list[str]:
    """List the layers that can have a LoRA by their names without any adapter on them."""
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            layers.append(name.removesuffix(".base_layer"))
    return layers


def find_layer(parts: Mapping[str, nn.Module], name: str) -> nn.Linear | nn.Conv2d:
    """Return the layer that a LoRA names ("unet.conv_in"), without any adapter on it."""
    part, _, layer = name.partition(".")
    module = parts[part].get_submodule(layer)
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Linear | nn.Conv2d)
    return base
