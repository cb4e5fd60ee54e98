"""Rewriting recipes from the time of `[[phases]]` and `objective` as recipes of `[[stages]]`.

What most stages have in common goes into `[defaults]`. The new recipe means exactly what the old
one meant.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w

from twostep.distill.methods.registry import settings_keys
from twostep.distill.recipe import DistillRecipe, Stage
from twostep.training.recipe import RecipeError

_METHODS = {
    "mse": {"name": "regression"},
    "convert": {"name": "conversion"},
    "conditional": {"name": "lightning", "objective": "conditional"},
    "unconditional": {"name": "lightning", "objective": "unconditional"},
}
"""What the objectives of old recipes are called now."""

_AS_THE_PAPER = {
    "name": "adversarial",
    "loss": "non-saturating",
    "levels": "mid",
    "discriminator_precision": "stage",
    "perturbation": 0.01,
}
"""What makes the adversarial method play the paper's game, to which a penalty can be added."""

_FIRST_KEYS = ("student_steps", "teacher_steps", "lora_rank")
"""What a stage begins with. It is never a default: it says what a stage is."""

_NUMBERS = re.compile(r"\[\n((?: +[\d.]+,\n)+)\]")
"""A list of numbers as tomli_w writes it, one in a line."""

_NEVER_DEFAULTS = (*_FIRST_KEYS, "method", "guidance")


def migrate(text: str) -> str:
    """Return an old recipe's TOML rewritten, with the comment at its top.

    Raises:
        RecipeError: it is not TOML, has no [[phases]], or is no valid recipe.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"this is not valid TOML: {error}") from error
    if "phases" not in values:
        raise RecipeError("there is nothing to rewrite: this recipe has no [[phases]].")
    migrated = migrate_values(values)
    try:
        DistillRecipe.model_validate(migrated)
    except ValueError as error:
        raise RecipeError(f"this was no valid recipe before: {error}") from error
    comment = _leading_comment(text)
    return f"{comment}\n{_to_toml(migrated)}" if comment else _to_toml(migrated)


def migrate_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of an old recipe as those of a new one, common ones as defaults."""
    rest = {key: value for key, value in values.items() if key != "phases"}
    health = dict(rest.get("health", {}))
    largest_gap = health.pop("largest_gap", None)
    if "health" in rest:
        rest["health"] = health
    stages = [_migrate_phase(phase) for phase in values["phases"]]
    if largest_gap is not None:
        for stage in stages:
            if stage["method"]["name"] in ("lightning", "adversarial"):
                stage["method"]["largest_gap"] = largest_gap
    defaults = _take_common(stages, Stage.model_fields, _NEVER_DEFAULTS)
    methods = {}
    for name in sorted({stage["method"]["name"] for stage in stages}):
        tables = [stage["method"] for stage in stages if stage["method"]["name"] == name]
        if common := _take_common(tables, settings_keys(name), ("name", "objective")):
            methods[name] = common
    if methods:
        defaults["methods"] = methods
    return {**rest, "defaults": defaults, "stages": stages}


def _migrate_phase(phase: Mapping[str, Any]) -> dict[str, Any]:
    """Return an old phase's values as those of a stage."""
    values = dict(phase)
    objective = values.pop("objective", None)
    if objective not in _METHODS:
        known = ", ".join(_METHODS)
        raise RecipeError(f"objective is {objective!r}; old recipes have one of {known}.")
    method: dict[str, Any] = dict(_METHODS[objective])
    if method["name"] == "lightning" and values.get("r1_weight"):
        # The paper has no penalty, so this was something else already.
        method |= _AS_THE_PAPER
        method["noised_weights"] = [values.pop("early_weight", 1), 1, 1, 1]
    settings = settings_keys(method["name"])
    of_any_method = {key for name in ("lightning", "adversarial") for key in settings_keys(name)}
    for key in list(values):
        if key in settings:
            method[key] = values.pop(key)
        elif key in of_any_method:
            # Old phases could have settings that their objective did not read.
            del values[key]
    if objective == "convert":
        # The student itself taught, whatever was written there.
        values.pop("teacher_steps", None)
    return {**values, "method": method}


def _take_common(
    tables: Sequence[dict[str, Any]], fields: Mapping[str, Any], never: Sequence[str]
) -> dict[str, Any]:
    """Take out of tables what most of them have in common, and return it.

    A table that leaves a key out means the field's own default, which is then written into it.
    """
    common: dict[str, Any] = {}
    if len(tables) < 2:
        return common
    for key in dict.fromkeys(key for table in tables for key in table):
        if key in never or key not in fields:
            continue
        fallback = fields[key].default
        if any(table.get(key, fallback) is None for table in tables):
            # TOML has no word for "not given", so it cannot be written into a table.
            continue
        values = [table.get(key, fallback) for table in tables]
        ((value, _),) = Counter(values).most_common(1)
        if value == fallback and not all(key in table for table in tables):
            continue
        common[key] = value
        for table, stated in zip(tables, values, strict=True):
            table.pop(key, None)
            if stated != value:
                table[key] = stated
    return common


def _leading_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line + "\n")
    return "".join(lines)


def _to_toml(values: Mapping[str, Any]) -> str:
    """Return TOML with every stage as a table of its own, however short it is."""
    rest = dict(values)
    stages = rest.pop("stages")
    defaults = rest.pop("defaults")
    methods = defaults.pop("methods", {})
    parts = [tomli_w.dumps(rest)]
    if defaults:
        parts.append(f"[defaults]\n{tomli_w.dumps(defaults)}")
    for name, settings in methods.items():
        parts.append(f"[defaults.methods.{name}]\n{tomli_w.dumps(settings)}")
    for stage in stages:
        first = {key: stage[key] for key in _FIRST_KEYS if key in stage}
        others = {key: value for key, value in stage.items() if key not in (*_FIRST_KEYS, "method")}
        parts.append(f"[[stages]]\n{tomli_w.dumps({**first, **others})}")
        parts.append(f"[stages.method]\n{tomli_w.dumps(stage['method'])}")
    return _NUMBERS.sub(_on_one_line, "\n".join(part for part in parts if part))


def _on_one_line(match: re.Match[str]) -> str:
    numbers = [line.strip().rstrip(",") for line in match[1].splitlines()]
    return f"[{', '.join(numbers)}]"
