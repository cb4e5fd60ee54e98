"""How progress is told to whoever shows it; how it is shown is unknown here."""

from collections.abc import Callable

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


def spoken(figures: dict[str, float]) -> str:
    """Return the figures of one iteration in a few words."""
    return " ".join(f"{key} {value:.3f}" for key, value in figures.items())
