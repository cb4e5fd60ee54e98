"""What PEFT says of an adapter beside its tensors: alphas, ranks, and how they are resolved.

diffusers writes it into the metadata of a file, by part (`unet.lora_alpha`); PEFT itself into
adapter_config.json beside the file, for one network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twostep.formats.header import Header
from twostep.formats.locate import ModelError, read_json

CONFIG_FILE = "adapter_config.json"
"""What PEFT writes beside an adapter's weights."""

METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers keeps the same in the metadata of a file."""

PARTS_BY_CLASS = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}
"""The parts of a model by the classes that PEFT names in adapter_config.json."""

_DEFAULT_ALPHA = 8.0
_DEFAULT_RANK = 8
"""PEFT's own defaults, which it leaves out of what it writes."""

_RELATIVES = ("LOHA", "LOKR")
"""PEFT's types whose scale is `alpha` / `r`, whatever the file's tensors say."""

_OWN_BASES = ("pissa", "olora", "corda", "loftq")
"""Ways of starting a LoRA that change the base too, so that it fits that base alone."""


class LoraError(ModelError):
    """A LoRA that is missing, a file that is none, or weights that do not fit."""


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT says of the adapter of one network; nothing, where it is empty.

    Args:
        values: The fields of a LoraConfig, LoHaConfig or LoKrConfig.
        source: What is named in errors.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    source: str = "adapter"

    def __post_init__(self) -> None:
        """Raise LoraError for values that no config can have."""
        for key in ("lora_alpha", "alpha", "r"):
            if key in self.values:
                self._number(key, self.values[key])
        for key in ("alpha_pattern", "rank_pattern"):
            pattern = self._pattern(key)
            for name, value in pattern.items():
                self._number(f"{key} of {name}", value)
                try:
                    re.compile(name)
                except re.error as error:
                    raise self._damaged(f"{key} has {name!r}, no pattern: {error}") from error
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_OWN_BASES):
            raise LoraError(
                f"{self.source}: it began as {start!r}, which changes the base as well, so it "
                "fits no other. Convert it with PEFT first (path_initial_model_for_weight_"
                "conversion)."
            )

    def alpha(self, names: list[str], rank: int) -> float | None:
        """Return the alpha of a layer, None if nothing is said of any.

        The patterns count first; with `use_rslora` (arXiv 2312.03732) the scale is alpha /
        sqrt(rank), which is returned as an alpha over the rank.

        Args:
            names: The names that the layer has.
            rank: Its rank.
        """
        if not self.values:
            return None
        alpha = self._matched("alpha_pattern", names)
        if alpha is None:
            alpha = float(self.values.get("lora_alpha", _DEFAULT_ALPHA))
        return alpha * math.sqrt(rank) if self.values.get("use_rslora") else alpha

    def check_rank(self, path: Path, layer: str, names: list[str], rank: int) -> None:
        """Raise LoraError if a layer has another rank than is said of it."""
        if "r" not in self.values:
            return
        expected = self._matched("rank_pattern", names) or float(self.values["r"])
        if expected != rank:
            raise LoraError(
                f"{path}: {layer} has the rank {rank}, and {self.source} says {expected:g}. "
                "They do not belong together: fetch or export both again."
            )

    def scale_of_relatives(self, names: list[str]) -> float | None:
        """Return what the change of a LoHa or LoKr is multiplied by; None if not PEFT's."""
        if self.values.get("peft_type") not in _RELATIVES:
            return None
        alpha = self._matched("alpha_pattern", names)
        rank = self._matched("rank_pattern", names)
        alpha = float(self.values.get("alpha", _DEFAULT_ALPHA)) if alpha is None else alpha
        return alpha / (rank or float(self.values.get("r", _DEFAULT_RANK)))

    def _matched(self, key: str, names: list[str]) -> float | None:
        """Return the value of the first pattern that fits, as PEFT resolves them.

        A pattern is a regular expression for the whole name, or for what follows a dot in it.
        """
        for pattern, value in self._pattern(key).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return float(value)
        return None

    def _pattern(self, key: str) -> Mapping[str, Any]:
        pattern = self.values.get(key) or {}
        if not isinstance(pattern, Mapping):
            raise self._damaged(f"{key} is {pattern!r}, no mapping")
        return pattern

    def _number(self, name: str, value: object) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(float(value)):  # type: ignore[arg-type]
            raise self._damaged(f"{name} is {value!r}, no number")
        if name.startswith("r") and float(value) < 1:  # type: ignore[arg-type]
            raise self._damaged(f"{name} is {value!r}, and a rank is 1 or more")

    def _damaged(self, problem: str) -> LoraError:
        return LoraError(f"{self.source} is damaged ({problem}). Fetch or export it again.")


def read_peft_configs(header: Header) -> dict[str, PeftConfig]:
    """Return what PEFT says of the adapter in a file, by part.

    It stands in the file's metadata, or, for a file with PEFT's names, in adapter_config.json
    beside it. Raises LoraError for what is damaged.
    """
    if METADATA_KEY in header.metadata:
        return _in_metadata(header)
    path = header.path.with_name(CONFIG_FILE)
    has_peft_names = header.has("base_model.model.") or any(
        ".lora_A." in name for name in header.shapes
    )
    if not has_peft_names or not path.is_file():
        return {}
    values = read_json(path)
    kind = values.get("peft_type", "LORA")
    if kind not in ("LORA", *_RELATIVES):
        raise LoraError(
            f"{path} describes {kind}, which is not read here: LoRA, LoHa and LoKr are."
        )
    config = PeftConfig(values, str(path))
    mapping = values.get("auto_mapping")
    class_name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if header.has("base_model.model."):
        return {PARTS_BY_CLASS.get(str(class_name), "unet"): config}
    return dict.fromkeys(PARTS_BY_CLASS.values(), config)


def _in_metadata(header: Header) -> dict[str, PeftConfig]:
    """Return what diffusers wrote into the metadata of a file."""
    source = f"{header.path}: its {METADATA_KEY}"
    try:
        metadata = json.loads(header.metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise LoraError(f"{source} is damaged ({error}). Fetch or export it again.") from error
    if not isinstance(metadata, dict):
        raise LoraError(f"{source} is damaged (no JSON object). Fetch or export it again.")
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in metadata.items():
        part, _, name = key.partition(".")
        by_part.setdefault(part, {})[name] = value
    parts = PARTS_BY_CLASS.values()
    return {part: PeftConfig(by_part[part], source) for part in parts if part in by_part}
