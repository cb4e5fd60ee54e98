"""What is told of work on many things: how many of them are done."""

from __future__ import annotations

from collections.abc import Callable

OnDone = Callable[[int, int], None]
"""Called with the number of things that are done, and of all."""


def untold(done: int, total: int) -> None:
    """Tell nobody, which is what happens where no `OnDone` is given."""
