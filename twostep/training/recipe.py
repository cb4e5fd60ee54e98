"""Recipes: TOML files that are checked by pydantic models, which live beside their owners.

Errors name the path of the key, what was wrong with its value, and the nearest right key.
"""

import codecs
import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from twostep.errors import TwostepError

RECIPES = Path(__file__).parent.parent / "recipes"


# Fields say by these, as their json_schema_extra, when a run may go on with another value.
ANY_TIME: dict[str, Any] = {"changes": "any time"}
"""Marks a field that no weight depends on."""

WHILE_RUNNING: dict[str, Any] = {"changes": "while running"}
"""Marks a field that a part in training can take up: only the iterations to come depend on it."""

COMPARED: dict[str, Any] = {"changes": "by contents"}
"""Marks a field that names a file or folder, whose contents must stay the same."""


class RecipeError(TwostepError):
    """A recipe could not be found, read or accepted."""


class Settings(BaseModel):
    """A part of a recipe: frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def bytes_of(text: str) -> float:
    """Return the bytes of a size as people write it: 24GB, 22.5GiB, 64MB or 64MiB.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([GM])(i?)B", text)
    if match is None:
        raise ValueError(f"{text} is no size; write 24GB, 22.5GiB or 64MB")
    thousand = 1024 if match[3] else 1000
    return float(match[1]) * thousand * thousand * (thousand if match[2] == "G" else 1)


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given by name or path; RecipeError lists the known names."""
    for path in (Path(name), RECIPES / f"{name}.toml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(str(name), recipe_names(), 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise RecipeError(f"There is no recipe '{name}'.{hint} Built in: {', '.join(recipe_names())}.")


def recipe_text(path: Path) -> str:
    """Return the text of a recipe, in UTF-8 or UTF-16, as editors and shells save it.

    Raises:
        RecipeError: it is in neither.
    """
    data = path.read_bytes()
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        # Windows' Notepad writes a mark in front of UTF-8, its shell's ">" UTF-16.
        return data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error


def load_recipe(
    name: str | Path, model: type[SettingsT], overrides: Iterable[str] = ()
) -> SettingsT:
    """Read a recipe, change some of its values, and check it.

    Args:
        name: of a recipe in the package, or a path.
        model: the settings that the recipe must fit.
        overrides: changes as "key.path=value", with the value in TOML; a number in the path is a
            position in a list.

    Raises:
        RecipeError: the recipe is not there, is not TOML, or has a key or value that does not fit.
    """
    return load_settings(find_recipe(name), model, overrides)


def load_settings(path: Path, model: type[SettingsT], overrides: Iterable[str] = ()) -> SettingsT:
    """Read a file of settings as `load_recipe` reads a recipe."""
    try:
        values = tomllib.loads(recipe_text(path))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}. Check the name.") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(values, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        places = [problem["loc"] for problem in found]
        # A list all of whose items are wrong is called empty as well, which it is not.
        problems = [
            _explain(problem, model, path)
            for problem in found
            if not any(_is_inside(place, problem["loc"]) for place in places)
        ]
        raise RecipeError("\n".join(problems)) from error


def _is_inside(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    """Tell whether a place in a recipe lies within another one."""
    return len(place) > len(other) and place[: len(other)] == other


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set the value of one override in the values of a recipe, in place."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(
            f"'{override}' is no override; write key.path=value, as in stages.1.learning_rate=1e-5."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A bare word is a string, so that nobody has to quote quotes in a shell.
        value = text
    target: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(target, dict):
            target = target.setdefault(part, {})
        else:
            target = target[_position(target, part, key)]
    if isinstance(target, dict):
        target[last] = value
    else:
        target[_position(target, last, key)] = value


def _position(target: Any, part: str, key: str) -> int:
    if not isinstance(target, list):
        raise RecipeError(f"'{key}': {target!r} is a value, which has no '{part}'; drop that part.")
    if not part.isdigit() or int(part) >= len(target):
        raise RecipeError(
            f"'{key}': '{part}' is no position in a list of {len(target)}; "
            f"use 0 to {len(target) - 1}."
        )
    return int(part)


def _explain(problem: Any, model: type[BaseModel], path: Path) -> str:
    """Say where a recipe does not fit its model, and what would."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":
        # A check of our own, which says what was given.
        message = problem["msg"].removeprefix("Value error, ")
        return f"{path}: {place}: {message}." if place else f"{path}: {message}."
    if problem["type"] != "extra_forbidden":
        return f"{path}: {place or 'its keys'}: {problem['msg']} (given: {problem['input']!r})"
    schema = model.model_json_schema()
    known = [
        key
        for part in (schema, *schema.get("$defs", {}).values())
        for key in part.get("properties", ())
    ]
    near = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
    hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}."
    return f"{path}: {place}: no such key.{hint}"
