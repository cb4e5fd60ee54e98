"""LoRA files in every dialect, and their relatives: read, merged and written without losing a key.

A LoRA changes the weights of layers to W' = W + alpha / rank * up down (arXiv 2106.09685); what
else a file can do to a weight is in `lora_kinds`. Here layers are called `unet.X`, `text_encoder.X`
or `text_encoder_2.X`, X being the network's own name, and biases `unet.X.bias`. In files PEFT adds
`.lora_A` and `.lora_B`, early diffusers `.lora.down` and `.lora.up`, or `.processor.to_q_lora.down`
in 2023; kohya writes `lora_unet_X.lora_down`, with underscores for dots, and X after diffusers or
after the first latent diffusion code. The last is what all programs read. All names follow from the
networks, so that small models have them too.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
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
from twostep.formats.lora_kinds import (
    Decomposed,
    Difference,
    Factor,
    Hadamard,
    Kronecker,
    LowRank,
    WeightChange,
    without_core,
)
from twostep.formats.motion_files import animatediff_name
from twostep.formats.peft_config import LoraError, PeftConfig, read_peft_configs

PICTURES = "pictures"
"""What the UNet that draws the frames of clips is called here, whose motion module is the "unet".

Files call both the unet.
"""

_UNETS = ("unet", PICTURES)

KOHYA = {
    "unet": "lora_unet_",
    PICTURES: "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
"""What kohya puts before the names of the layers of each part."""

_OF_UNETS = ("unet", "lora_unet", "diffusion_model", "model_diffusion_model", "lycoris", "")

_PREFIXES = {
    "unet": _OF_UNETS,
    PICTURES: _OF_UNETS,
    "text_encoder": ("text_encoder", "lora_te1", "clip_l", "text_encoders_clip_l_transformer"),
    "text_encoder_2": ("text_encoder_2", "lora_te2", "clip_g", "text_encoders_clip_g_transformer"),
}
"""What programs put before the names of the layers of each part.

The last of the UNet's is for files that hold a UNet's layers without any word before them. Dots
count as underscores here, so that OneTrainer's `lora_unet.X` and kohya's `lora_unet_X` are one.
"""

_OF_PEFT = "base_model_model_"
"""What PEFT puts before the names of a network that it saves by itself; see `peft_config`."""

BUNDLED = "bundle_emb."
"""Before the tensors of textual inversions that OneTrainer packs into a LoRA; see `embeddings`."""


@dataclass(frozen=True)
class Dialect:
    """How a program names a LoRA's tensors.

    `place` is the position of its name for a layer in what `_written_names` lists; `down` and `up`
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

_ENDINGS = {
    "down": r"(\.(lora_A(\.\w+)?|lora(_linear_layer)?\.down|lora_down)|_lora\.down)\.weight",
    "up": r"(\.(lora_B(\.\w+)?|lora(_linear_layer)?\.up|lora_up)|_lora\.up)\.weight",
    "up_bias": r"\.lora_B(\.\w+)?\.bias",
    "core": r"\.lora_mid\.weight",
    "alpha": r"(_lora)?\.alpha",
    "lengths": r"\.dora_scale",
    "peft_lengths": r"\.lora_magnitude_vector(\.(?!weight)\w+)?(\.weight)?",
    "hada_w1_a": r"\.hada_w1_a",
    "hada_w1_b": r"\.hada_w1_b",
    "hada_w2_a": r"\.hada_w2_a",
    "hada_w2_b": r"\.hada_w2_b",
    "hada_t1": r"\.hada_t1",
    "hada_t2": r"\.hada_t2",
    "lokr_w1": r"\.lokr_w1",
    "lokr_w1_a": r"\.lokr_w1_a",
    "lokr_w1_b": r"\.lokr_w1_b",
    "lokr_w2": r"\.lokr_w2",
    "lokr_w2_a": r"\.lokr_w2_a",
    "lokr_w2_b": r"\.lokr_w2_b",
    "lokr_t2": r"\.lokr_t2",
    "difference": r"\.(diff|w_norm)",
    "bias": r"\.(diff_b|b_norm)",
}
"""How the keys of the tensors end, by what they are for a layer."""

_KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    + "|".join(f"(?P<{role}>{ending})" for role, ending in _ENDINGS.items())
    + ")"
)

_CHANGEABLE = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
"""The layers whose weights a file can change."""

Tensors = Mapping[str, Tensor]
"""The tensors of one layer, by the names of `_ENDINGS`."""


def read_lora(
    lora: Checkpoint | str | Path, parts: Mapping[str, nn.Module], *, alpha: float | None = None
) -> dict[str, WeightChange]:
    """Read what a LoRA, or a relative of it, does to the layers of networks.

    Arguments:
        lora: the file, whose header is read only if it is not given as a checkpoint.
        parts: the networks, by the names of `KOHYA`.
        alpha: the alpha of layers for which the file has none; their rank by default.

    An alpha stands in a tensor, else in what PEFT says of the file (its metadata, or
    adapter_config.json beside it), else it is `alpha`.

    Returns the changes in the file's precision, by part and layer ("unet.conv_in"); of a bias by
    "unet.conv_in.bias". Raises LoraError, with what the file is, if a key has no layer, a layer
    lacks a half, its shape does not fit, or it holds NaN or infinity.
    """
    header = resolve(lora).file
    configs = read_peft_configs(header)
    changes: dict[str, WeightChange] = {}
    for name, tensors in _collect(header, parts, configs).items():
        part, _, layer = name.partition(".")
        _check_finite(header.path, name, tensors)
        config = configs.get(part, PeftConfig())
        read = _Layer(header.path, name, tensors, config, find_layer(parts, name), alpha)
        changes |= read.changes([layer, _full_name(part, layer)])
    if not changes:
        raise LoraError(f"{header.path} is empty.")
    return changes


@dataclass(frozen=True, eq=False)
class _Layer:
    """The tensors of one layer in a file, and all that is needed to read them."""

    path: Path
    name: str
    tensors: Tensors
    config: PeftConfig
    module: nn.Module
    default_alpha: float | None

    def changes(self, pattern_names: list[str]) -> dict[str, WeightChange]:
        """Return what the tensors do to the layer's weight and bias, by their names."""
        changes: dict[str, WeightChange] = {}
        weight = self._weight_change(pattern_names)
        if weight is not None:
            changes[self.name] = self._checked(weight, self._parameter("weight"))
        bias = self.tensors.get("bias")
        if "up_bias" in self.tensors:
            # PEFT scales the bias as it scales the product.
            assert isinstance(weight, LowRank | Decomposed)
            inner = weight if isinstance(weight, LowRank) else weight.inner
            assert isinstance(inner, LowRank)
            bias = self.tensors["up_bias"].float() * (inner.alpha / inner.rank)
        if bias is not None:
            changes[f"{self.name}.bias"] = self._checked(Difference(bias), self._parameter("bias"))
        return changes

    def _weight_change(self, pattern_names: list[str]) -> WeightChange | None:
        """Return what the tensors do to the layer's weight, None if nothing."""
        made: list[WeightChange] = []
        inner: LowRank | Hadamard | Kronecker | None = None
        for make, words in (
            (self._low_rank, ("down", "up", "core", "up_bias")),
            (self._hadamard, ("hada_",)),
            (self._kronecker, ("lokr_",)),
        ):
            if any(role.startswith(words) for role in self.tensors):
                inner = make(pattern_names)
                made.append(inner)
        if "difference" in self.tensors:
            made.append(Difference(self.tensors["difference"]))
        if len(made) > 1:
            kinds = " and a ".join(change.kind for change in made)
            raise LoraError(f"{self.path} has a {kinds} for {self.name}; expected one of them.")
        lengths = self.tensors.get("peft_lengths", self.tensors.get("lengths"))
        if lengths is None:
            return made[0] if made else None
        if inner is None:
            raise LoraError(f"{self.path} has lengths for {self.name} and no change of its weight.")
        weight = self._parameter("weight")
        # PEFT has them of rows alone; of others the shape tells.
        of_rows = "peft_lengths" in self.tensors or lengths.shape[:1] == weight.shape[:1]
        return Decomposed(inner, lengths, of_rows=of_rows)

    def _low_rank(self, pattern_names: list[str]) -> LowRank:
        weight = self._parameter("weight")
        down, up = self._halves(weight)
        rank = len(down)
        self.config.check_rank(self.path, self.name, pattern_names, rank)
        alpha = self.config.alpha(pattern_names, rank)
        return LowRank(
            down=down.reshape(-1, *weight.shape[1:]),
            up=up.reshape(len(weight), -1, *[1] * (weight.dim() - 2)),
            alpha=self._alpha(float(rank) if alpha is None else alpha, is_known=alpha is not None),
        )

    def _halves(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return both halves; raises LoraError unless their product fits the weight."""
        down = self._needed("down", "the down half")
        up = self._needed("up", "the up half")
        core = self.tensors.get("core")
        _check_rank(self.path, self.name, down)
        given = f"its halves are {list(up.shape)} and {list(down.shape)}"
        if core is not None:
            given += f" around {list(core.shape)}"
            if core.dim() != 4 or core.shape[:2] != (len(down), len(down)):
                raise self._misfit(weight, given)
            down = without_core(down, core)
        rows, columns = weight.flatten(1).shape
        fits_down = down.flatten(1).shape[1] == columns
        fits_up = len(up) == rows and up.dim() > 1 and up.flatten(1).shape[1] == len(down)
        if weight.dim() < 2 or not fits_down or not fits_up:
            raise self._misfit(weight, given)
        return down, up

    def _hadamard(self, pattern_names: list[str]) -> Hadamard:
        first = self._product("hada_w1", "hada_t1")
        second = self._product("hada_w2", "hada_t2")
        rank = first.rank
        assert rank is not None
        scale = self.config.scale_of_relatives(pattern_names)
        if scale is not None:
            return Hadamard(_scaled(first, scale), second, float(rank))
        return Hadamard(first, second, self._alpha(float(rank)))

    def _kronecker(self, pattern_names: list[str]) -> Kronecker:
        first = self._factor("lokr_w1", None)
        second = self._factor("lokr_w2", "lokr_t2")
        scale = self.config.scale_of_relatives(pattern_names)
        if scale is not None:
            return Kronecker(_scaled(first, scale), second, None)
        rank = second.rank or first.rank
        return Kronecker(first, second, None if rank is None else self._alpha(float(rank)))

    def _factor(self, name: str, core: str | None) -> Factor:
        """Return a factor that may be stored whole."""
        if name in self.tensors:
            return Factor(self.tensors[name])
        return self._product(name, core)

    def _product(self, name: str, core: str | None) -> Factor:
        factor = Factor(
            self._needed(f"{name}_a", f"{name}_a"),
            self._needed(f"{name}_b", f"{name}_b"),
            None if core is None else self.tensors.get(core),
        )
        assert factor.b is not None
        _check_rank(self.path, self.name, factor.b)
        return factor

    def _needed(self, role: str, words: str) -> Tensor:
        if role not in self.tensors:
            raise LoraError(f"{self.path} lacks {words} of {self.name}. Fetch or export it again.")
        return self.tensors[role]

    def _alpha(self, otherwise: float, *, is_known: bool = False) -> float:
        """Return the alpha in the file, or the one that is taken without it.

        With `is_known` that is `otherwise`, else the caller's default if there is one.
        """
        tensor = self.tensors.get("alpha")
        if tensor is None:
            if is_known or self.default_alpha is None:
                return float(otherwise)
            return float(self.default_alpha)
        if tensor.numel() != 1:
            raise LoraError(
                f"{self.path}: the alpha of {self.name} has the shape {list(tensor.shape)}; "
                "expected a single number. Fetch or export it again."
            )
        alpha = float(tensor.item())
        if not math.isfinite(alpha):
            raise LoraError(
                f"{self.path}: the alpha of {self.name} is {alpha}; expected a finite number. "
                "Fetch or export it again."
            )
        return alpha

    def _parameter(self, kind: str) -> Tensor:
        parameter = getattr(self.module, kind, None)
        if parameter is None:
            raise LoraError(
                f"{self.path} changes the {kind} of {self.name}, which has none here. "
                "It was made for a model of another kind."
            )
        assert isinstance(parameter, Tensor)
        return parameter

    def _checked(self, change: WeightChange, weight: Tensor) -> WeightChange:
        """Return a change that fits a weight; raises LoraError for any other."""
        try:
            fits = change.fits(weight)
        except (RuntimeError, IndexError):  # factors that cannot be multiplied
            fits = False
        if not fits:
            shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in self.tensors.items())
            raise self._misfit(weight, f"the file has {shapes}")
        return change

    def _misfit(self, weight: Tensor, given: str) -> LoraError:
        return LoraError(
            f"{self.path} does not fit: {self.name} is {list(weight.shape)}, and {given}. "
            "It was made for a model of another kind."
        )


def _check_finite(path: Path, name: str, tensors: Tensors) -> None:
    """Raise LoraError where a layer's weights hold NaN or infinity; an alpha is checked as it is
    read.
    """
    for role, tensor in tensors.items():
        if role == "alpha":
            continue
        # Numbers of 8 bits cannot be asked themselves.
        numbers = tensor.float() if tensor.element_size() == 1 else tensor
        if not bool(numbers.isfinite().all()):
            raise LoraError(
                f"{path} holds NaN or infinity for {name}: it is damaged, or its training ended "
                "so. Fetch it again, or take one that was saved earlier."
            )


def _check_rank(path: Path, name: str, down: Tensor) -> None:
    """Raise LoraError for a half without any rows."""
    if down.dim() < 2 or len(down) < 1:
        raise LoraError(
            f"{path}: {name} has a half of the shape {list(down.shape)}; expected a rank of 1 or "
            "more. Fetch or export it again."
        )


def _scaled(factor: Factor, scale: float) -> Factor:
    return Factor(factor.a.float() * scale, factor.b, factor.core)


def _collect(
    header: Header, parts: Mapping[str, nn.Module], configs: Mapping[str, PeftConfig]
) -> dict[str, dict[str, Tensor]]:
    """Read all tensors of a file, of every layer that it changes."""
    layers_by_name = _layers_by_name(parts, of_peft=next(iter(configs), "unet"))
    places: dict[str, dict[str, str]] = {}
    for key in header.shapes:
        if key.startswith(BUNDLED):
            continue
        match = _KEY.fullmatch(key)
        layer = layers_by_name.get(_flat(match["layer"])) if match else None
        if match is None or layer is None:
            raise LoraError(
                f"{header.path} is {kind_of(header)}: it has {key}, and no layer of "
                f"{', '.join(parts)} is called so."
            )
        role = next(role for role in _ENDINGS if match[role])
        keys = places.setdefault(layer, {})
        if role in keys:
            raise LoraError(
                f"{header.path} mixes dialects: {key} is there a second time under another name."
            )
        keys[role] = key
    # Only now, for a file of another kind may be large.
    tensors = load_file(header.path)
    return {
        layer: {role: tensors[key] for role, key in keys.items()} for layer, keys in places.items()
    }


def _flat(name: str) -> str:
    """Return a layer's name with underscores for dots, without the word of 2023's diffusers."""
    return name.replace(".processor.", ".").replace(".", "_")


def _layers_by_name(parts: Mapping[str, nn.Module], *, of_peft: str) -> dict[str, str]:
    """Return the layers by all names that files have for them, flattened by `_flat`.

    `of_peft` is the part that PEFT's own files, which do not name it, are about.
    """
    layers = {}
    for part, layer, old in _layers(parts):
        full = _full_name(part, layer)
        names = {layer, full, old}
        if part == "text_encoder_2":
            names.add(f"text_model.{layer}")  # of the projection: what older versions wrote
        for name in list(names):  # attention, as diffusers called it in 2023
            names.add(re.sub(r"to_out\.0$", "to_out", name))
            if part not in _UNETS:
                names.add(re.sub(r"(q|k|v|out)_proj$", r"to_\1", name))
        prefixes = [f"{prefix}_" if prefix else "" for prefix in _PREFIXES[part]]
        if part == of_peft:
            prefixes.append(_OF_PEFT)
        for prefix in prefixes:
            for name in names:
                layers[prefix + _flat(name)] = f"{part}.{layer}"
    return layers


@torch.no_grad()
def merge_lora(
    lora: Mapping[str, WeightChange], parts: Mapping[str, nn.Module], *, weight: float = 1.0
) -> None:
    """Apply a LoRA at a strength to the weights of networks, in place."""
    for name, change in lora.items():
        target = find_parameter(parts, name)
        target.copy_(change.applied(target, weight))


def write_lora(
    lora: Mapping[str, WeightChange], parts: Mapping[str, nn.Module], dialect: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a LoRA's file in one of `DIALECTS`.

    Halves and factors stay bit for bit. Raises LoraError for an unknown dialect, and for one that
    has no words for what the LoRA does.
    """
    if dialect not in DIALECTS:
        raise LoraError(f"There is no dialect {dialect!r}; there are {', '.join(DIALECTS)}.")
    words = DIALECTS[dialect]
    names = _written_names(parts)
    tensors: dict[str, Tensor] = {}
    for layer, change in lora.items():
        _check_words(layer, change, dialect)
        is_bias = layer.endswith(".bias")
        name = names[layer.removesuffix(".bias")][words.place]
        is_text = layer.partition(".")[0] not in _UNETS
        down = words.text_down if is_text and words.text_down else words.down
        up = words.text_up if is_text and words.text_up else words.up
        for ending, tensor in _written(change, down, up, words.has_alpha, is_bias).items():
            tensors[f"{name}.{ending}"] = tensor
    if words.has_alpha:
        return tensors, _kohya_metadata(lora)
    if dialect == "peft":
        return tensors, {"lora_adapter_metadata": json.dumps(_peft_metadata(lora))}
    return tensors, {}


def write_motion_lora(lora: Mapping[str, WeightChange]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA on a motion module by the names of AnimateDiff's motion LoRAs.

    These have no alpha, so its factor goes into the half that is called up. AnimateDiff's own are
    on attentions alone; what it says of them ("processor", "to_q_lora") says of other layers the
    same, and programs that take a layer's name from it find these too.

    Args:
        lora: by layers of the motion module ("unet.down_blocks.0.motion_modules.0...").

    Raises:
        LoraError: what it does to a layer is no LoRA, for which there are no names.
    """
    tensors: dict[str, Tensor] = {}
    for layer, change in lora.items():
        if not isinstance(change, LowRank):
            raise LoraError(
                f"AnimateDiff's motion LoRAs hold LoRA alone, and {layer} has a {change.kind}. "
                "Take the file as it is."
            )
        name = animatediff_name(layer.partition(".")[2])
        name = re.sub(r"(\.attention_blocks\.\d+)\.", r"\1.processor.", name)
        name = name.replace(".to_out.0", ".to_out")
        factor = change.alpha / change.rank
        tensors[f"{name}_lora.down.weight"] = change.down
        tensors[f"{name}_lora.up.weight"] = (factor * change.up.float()).to(change.up.dtype)
    return tensors


def _check_words(layer: str, change: WeightChange, dialect: str) -> None:
    """Raise LoraError if a dialect has no words for a change."""
    if dialect in ("kohya", "kohya-diffusers"):
        return
    if dialect == "early":
        if not isinstance(change, LowRank):
            raise LoraError(
                f"Early files hold LoRA alone, and {layer} has a {change.kind}. Use kohya."
            )
        if change.alpha != change.rank:
            raise LoraError(
                f"Early files have no alpha, and {layer} has {change.alpha:g} at rank "
                f"{change.rank}. Use peft."
            )
    inner = change.inner if isinstance(change, Decomposed) and change.of_rows else change
    if not isinstance(inner, LowRank):
        raise LoraError(
            f"Files by PEFT's names hold LoRA and DoRA of rows, and {layer} has a {change.kind}. "
            "Use kohya."
        )


def _written(
    change: WeightChange, down: str, up: str, has_alpha: bool, is_bias: bool
) -> dict[str, Tensor]:
    """Return the tensors of a change by the endings of their keys.

    `down` and `up` are the words for the halves; without `has_alpha` alphas stand in the metadata.
    """
    if isinstance(change, Difference):
        return {"diff_b" if is_bias else "diff": change.difference}
    if isinstance(change, Decomposed):
        tensors = _written(change.inner, down, up, has_alpha, is_bias)
        if has_alpha:
            return {**tensors, "dora_scale": _kohya_lengths(change)}
        return {**tensors, "lora_magnitude_vector": _peft_lengths(change)}
    if isinstance(change, LowRank):
        tensors = {f"{down}.weight": change.down, f"{up}.weight": change.up}
        return tensors | ({"alpha": _alpha_tensor(change.alpha, change.down)} if has_alpha else {})
    if isinstance(change, Hadamard):
        tensors = _factor_tensors(change.first, "hada_w1", "hada_t1")
        tensors |= _factor_tensors(change.second, "hada_w2", "hada_t2")
        return {**tensors, "alpha": _alpha_tensor(change.alpha, change.first.a)}
    assert isinstance(change, Kronecker)
    tensors = _factor_tensors(change.first, "lokr_w1", "lokr_t1")
    tensors |= _factor_tensors(change.second, "lokr_w2", "lokr_t2")
    rank = change.second.rank or change.first.rank
    if rank is not None:
        alpha = float(rank) if change.alpha is None else change.alpha
        tensors["alpha"] = _alpha_tensor(alpha, change.first.a)
    return tensors


def _factor_tensors(factor: Factor, name: str, core: str) -> dict[str, Tensor]:
    if factor.b is None:
        return {name: factor.a}
    tensors = {f"{name}_a": factor.a, f"{name}_b": factor.b}
    return tensors if factor.core is None else {**tensors, core: factor.core}


def _num_axes(change: Decomposed) -> int:
    """Return how many axes the weight of a decomposed change has."""
    return change.inner.down.dim() if isinstance(change.inner, LowRank) else 2


def _kohya_lengths(change: Decomposed) -> Tensor:
    """Return lengths in LyCORIS' shape: [rows, 1, ...] or [1, columns, ...]."""
    if change.magnitude.dim() > 1 and change.magnitude.shape[0 if change.of_rows else 1] > 1:
        return change.magnitude
    shape = [1] * _num_axes(change)
    shape[0 if change.of_rows else 1] = -1
    return change.magnitude.reshape(shape)


def _peft_lengths(change: Decomposed) -> Tensor:
    """Return lengths in PEFT's shape: [rows], or [1, rows, 1, 1] of a convolution."""
    num_axes = _num_axes(change)
    return change.magnitude.reshape([-1] if num_axes == 2 else [1, -1, 1, 1])


def _alpha_tensor(alpha: float, like: Tensor) -> Tensor:
    """Return alpha in the precision of the halves, as kohya keeps it, or in float32 to be exact."""
    tensor = torch.tensor(alpha, dtype=like.dtype)
    return tensor if tensor.item() == alpha else torch.tensor(alpha, dtype=torch.float32)


def _kohya_metadata(lora: Mapping[str, WeightChange]) -> dict[str, str]:
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "lycoris.kohya"}
    if all(isinstance(change, LowRank) for change in lora.values()):
        metadata["ss_network_module"] = "networks.lora"
    first = _first_low_rank(lora)
    if first is not None:
        metadata["ss_network_dim"] = str(first.rank)
        metadata["ss_network_alpha"] = f"{first.alpha:g}"
    return metadata


def _first_low_rank(lora: Mapping[str, WeightChange]) -> LowRank | None:
    for change in lora.values():
        inner = change.inner if isinstance(change, Decomposed) else change
        if isinstance(inner, LowRank):
            return inner
    return None


@dataclass
class _PeftPart:
    """The adapter of one network as PEFT describes it; patterns hold what differs from the rest."""

    r: int
    lora_alpha: float
    target_modules: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False


def _peft_metadata(lora: Mapping[str, WeightChange]) -> dict[str, Any]:
    """Return what diffusers writes of ranks and alphas; the first layer of a part is the rule."""
    described: dict[str, _PeftPart] = {}
    for layer, change in lora.items():
        low_rank = change.inner if isinstance(change, Decomposed) else change
        assert isinstance(low_rank, LowRank)
        part, _, name = layer.partition(".")
        adapter = described.setdefault(part, _PeftPart(low_rank.rank, low_rank.alpha))
        adapter.use_dora |= isinstance(change, Decomposed)
        adapter.target_modules.append(name)
        # A pattern holds for every name that ends with it; "^" makes it the whole name.
        if low_rank.rank != adapter.r:
            adapter.rank_pattern[f"^{name}"] = low_rank.rank
        if low_rank.alpha != adapter.lora_alpha:
            adapter.alpha_pattern[f"^{name}"] = low_rank.alpha
    metadata = {}
    for part, adapter in described.items():
        for key, value in vars(adapter).items():
            metadata[f"{part}.{key}"] = value
    return metadata


def _written_names(parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return by layer the names that `DIALECTS` write, without the word for the half.

    They are diffusers' name, kohya's after diffusers, and kohya's after the first latent diffusion
    code.
    """
    names = {}
    for part, layer, old in _layers(parts):
        full = _full_name(part, layer)
        kohya = [KOHYA[part] + name.replace(".", "_") for name in (full, old)]
        diffusers = "unet" if part in _UNETS else part
        names[f"{part}.{layer}"] = [f"{diffusers}.{full}", *kohya]
    return names


def _layers(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, str]]:
    """Yield part and name of every layer, and its name in the first latent diffusion code.

    Of a motion module, it is the name that AnimateDiff has for it.
    """
    for part, network in parts.items():
        layers = _layers_with_weights(network)
        old = unet_names([f"{layer}.weight" for layer in layers]) if part in _UNETS else {}
        for layer in layers:
            name = old.get(f"{layer}.weight", _full_name(part, layer)).removesuffix(".weight")
            if ".motion_modules." in layer:
                name = animatediff_name(layer)
            yield part, layer, name


def _full_name(part: str, layer: str) -> str:
    """Return a layer's name as files have it.

    Newer transformers dropped the first word of CLIP's names; files keep it. The projection never
    had it.
    """
    if part in _UNETS or layer.startswith(("text_model.", "text_projection")):
        return layer
    return f"text_model.{layer}"


def _layers_with_weights(network: nn.Module) -> list[str]:
    """List the layers that a file can change by their names without any adapter on them."""
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, _CHANGEABLE) and ".lora_" not in name:
            layers.append(name.removesuffix(".base_layer"))
    return layers


def find_layer(parts: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the layer that a LoRA names ("unet.conv_in"), without any adapter on it."""
    part, _, layer = name.partition(".")
    module = parts[part].get_submodule(layer)
    base = getattr(module, "base_layer", module)
    assert isinstance(base, _CHANGEABLE)
    return base


def find_parameter(parts: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """Return the weight of a layer that a change names, or the bias if it is named."""
    layer, kind = split_name(name)
    parameter = getattr(find_layer(parts, layer), kind)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def split_name(name: str) -> tuple[str, str]:
    """Return the layer that a change names, and "weight" or "bias"."""
    if name.endswith(".bias"):
        return name.removesuffix(".bias"), "bias"
    return name, "weight"
