"""Recipes: TOML files checked by pydantic models that live beside their owners.

Errors name the path of the key, what was wrong with it and the nearest right key.
"""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from twostep.errors import TwostepError

RECIPES = Path(__file__).parent.parent / "recipes"


class RecipeError(TwostepError):
    """A recipe could not be found, read or accepted."""


class Settings(BaseModel):
    """A part of a recipe: frozen, and no key that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given by name or path; RecipeError lists the names there are."""
    for path in (Path(name), RECIPES / f"{name}.toml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(str(name), recipe_names(), 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"There is no recipe '{name}'.{hint} Built in: {', '.join(recipe_names())}.")


def load_recipe(
    name: str | Path, model: type[SettingsT], overrides: Iterable[str] = ()
) -> SettingsT:
    """Read a recipe by name or path, apply `key.path=value` overrides (TOML values), and check it
    against `model`.
    """
    path = find_recipe(name)
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(_explain(problem, model, path) for problem in error.errors())
        ) from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(
            f"'{override}' is no override; write key.path=value, as in stages.1.learning_rate=1e-5."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target: Any = values
    *parents, last = key.split(".")
    for part in parents:
        target = (
            target.setdefault(part, {})
            if isinstance(target, dict)
            else target[_position(target, part, key)]
        )
    target[last if isinstance(target, dict) else _position(target, last, key)] = value


def _position(target: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise RecipeError(
            f"'{key}': '{part}' is no position in a list of {len(target)}; use 0 to {len(target) - 1}."
        )
    return int(part)


def _explain(problem: Any, model: type[BaseModel], path: Path) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        # A check of our own, which says what was given.
        message = problem["msg"].removeprefix("Value error, ")
        return f"{path}: {place}: {message}." if place else f"{path}: {message}."
    if problem["type"] != "extra_forbidden":
        return f"{path}: {place or 'recipe'}: {problem['msg']} (given: {problem['input']!r})"
    schema = model.model_json_schema()
    known = [
        key
        for part in (schema, *schema.get("$defs", {}).values())
        for key in part.get("properties", ())
    ]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}."
    return f"{path}: {place}: no such key.{hint}"
