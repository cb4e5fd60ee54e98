"""A teacher's sampling trajectories, here called walks, which students can learn their steps from.

Pairs of their points are known as ODE pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twostep.diffusion.shapes import Batch, Time, Times
from twostep.networks.conditioning import Conditioning
from twostep.training.recipe import RecipeError

_SAME_TIME = 1e-6
"""Of the whole way, by which real times that are meant to be the same may differ."""


@dataclass(frozen=True, eq=False)
class Walks:
    """How a teacher went from pure noise to clean data, point by point.

    Args:
        states: latents at every point [batch, points, ...]: noise first, the last is clean.
        times: of the points, falling, the landing 0 included; the same for all items.
        conditioning: what was drawn.
    """

    states: Tensor
    times: tuple[Time, ...]
    conditioning: Conditioning

    def at(self, times: Times) -> Batch:
        """Return the state of every item at a time of its own; RecipeError where none stood there.

        Args:
            times: one per item, on the CPU.
        """
        near = [
            min(range(len(self.times)), key=lambda place: abs(self.times[place] - time))
            for time in times.tolist()
        ]
        for place, time in zip(near, times.tolist(), strict=True):
            if abs(self.times[place] - time) > _SAME_TIME * self.times[0]:
                raise RecipeError(
                    f"walks of {len(self.times) - 1} steps do not come by the time {time:g}, at "
                    "which the student is trained: take walks of a multiple of its steps, and of 4."
                )
        rows = torch.arange(len(near))
        return self.states[rows, torch.tensor(near)]
