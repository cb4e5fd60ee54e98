"""Engines: how the networks of a loaded model are run.

The names below are loaded when first touched: compiled networks can be read without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twostep.engines.engine import Engine, find_engine, register_engine, registered_engine
    from twostep.engines.errors import EngineError

__all__ = ["Engine", "EngineError", "find_engine", "register_engine", "registered_engine"]

_HOMES = {
    "Engine": "engine",
    "EngineError": "errors",
    "find_engine": "engine",
    "register_engine": "engine",
    "registered_engine": "engine",
}


def __getattr__(name: str) -> object:
    """Load a public name from its file when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'twostep.engines' has no attribute {name!r}")
    return getattr(import_module(f"twostep.engines.{_HOMES[name]}"), name)
