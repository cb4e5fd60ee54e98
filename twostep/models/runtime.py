"""How the networks of a bundle are run, and what an engine has to tell whoever draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import local
from typing import Any


def _as_it_is(network: Any) -> Any:
    return network


@dataclass(frozen=True, eq=False)
class Runtime:
    """What runs the networks of a bundle.

    Args:
        engine: The name of the engine.
        convert: Returns another network, a ControlNet for example, as the engine runs it.
    """

    engine: str = "eager"
    convert: Callable[[Any], Any] = _as_it_is


class _Notes(local):
    """What was said in a thread and is not taken yet, each sentence once."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}


_notes = _Notes()


def say(text: str) -> None:
    """Note a sentence for whoever draws in this thread: it becomes a warning of the next result."""
    _notes.texts[text] = None


def take_notes() -> list[str]:
    """Return what was said in this thread since the last time, in order."""
    texts = list(_notes.texts)
    _notes.texts.clear()
    return texts
