"""Figures of iterations, which may still be on the device that computes them.

Reading a number from an accelerator waits for everything that was queued before it. So figures stay
where they are until several are read at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Figures = Mapping[str, float | Tensor]
"""The figures of one iteration by name: numbers, or scalars in float32 that all lie on one device.
"""


class UnreadFigures:
    """The figures of the last iterations, in order, until they are taken."""

    def __init__(self) -> None:
        """Hold none."""
        self._unread: list[tuple[int, Figures]] = []

    def add(self, iteration: int, figures: Figures) -> None:
        """Take in the figures of an iteration without reading them."""
        held = {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in figures.items()
        }
        self._unread.append((iteration, held))

    def taken(self) -> list[tuple[int, dict[str, float]]]:
        """Return every iteration with its figures as numbers, read at once, and hold none."""
        scalars = [
            value
            for _, figures in self._unread
            for value in figures.values()
            if isinstance(value, Tensor)
        ]
        numbers = iter(torch.stack(scalars).tolist() if scalars else ())
        taken = []
        for iteration, figures in self._unread:
            read = {
                key: float(next(numbers)) if isinstance(value, Tensor) else value
                for key, value in figures.items()
            }
            taken.append((iteration, read))
        self._unread = []
        return taken
