"""Finding a method by name: a built-in one, a registered one, or one in any module."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from twostep.distill.method import Method

    MethodT = TypeVar("MethodT", bound=type[Method[Any]])

_BUILT_IN = {
    "regression": "twostep.distill.methods.regression:Regression",
    "conversion": "twostep.distill.methods.conversion:Conversion",
    "lightning": "twostep.distill.methods.lightning:Lightning",
    "adversarial": "twostep.distill.methods.adversarial:Adversarial",
    "lcm": "twostep.distill.methods.lcm:Lcm",
    "add": "twostep.distill.methods.add:Add",
    "ladd": "twostep.distill.methods.ladd:Ladd",
    "dmd2": "twostep.distill.methods.dmd2:Dmd2",
}
"""Where the built-in methods are; each is imported when it is first asked for."""

_REGISTERED: dict[str, type[Method[Any]]] = {}


def register_method(method: MethodT) -> MethodT:
    """Let recipes name a method, by its `name`; can be used as a decorator.

    Raises:
        ValueError: the name belongs to a built-in or another registered method.
    """
    if method.name in _BUILT_IN or _REGISTERED.get(method.name, method) is not method:
        raise ValueError(f"there is a method named {method.name!r} already; choose another name")
    _REGISTERED[method.name] = method
    return method


def method_names() -> list[str]:
    """Return the names of all built-in and registered methods."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def find_method(name: str) -> type[Method[Any]]:
    """Return the method of a name.

    Args:
        name: of a built-in or registered method, or "module:attribute".

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    place = _BUILT_IN.get(name, name)
    if ":" not in place:
        near = difflib.get_close_matches(name, method_names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no method {name!r}.{hint} There are {', '.join(method_names())}; "
            'one of your own is written "module:attribute"'
        )
    try:
        method: type[Method[Any]] = resolve_name(place)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"the method {name!r} cannot be imported: {error}") from error
    return method


def methods_with_setting(key: str) -> list[str]:
    """Return the names of all known methods that have a setting of that name."""
    return [name for name in method_names() if key in settings_keys(name)]


def settings_keys(name: str) -> Mapping[str, Any]:
    """Return the fields of a method's settings by their keys."""
    return find_method(name).Settings.model_fields
