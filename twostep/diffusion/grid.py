"""Which times a sampler visits, and where a step lands.

The trailing grid of N steps is the N times T k / N, k = N..1, rounded half to even (section 3.5 of
arXiv 2402.13929); the last step lands on 0. Grids nest: every time of N steps is one of 2N steps.
These are times in 1..T; the index a network is fed is one less. Fractions stay exact until the last
rounding, otherwise the nesting would break.
"""

from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int

from twostep.diffusion.shapes import Times
from twostep.errors import TwostepError


class GridError(TwostepError):
    """A number of steps, or a time, for which there is no grid."""


def trailing_times(num_steps: int, num_times: int = 1000) -> tuple[int, ...]:
    """List the times of the trailing grid, falling from T, without the landing 0; GridError outside
    1..T steps.
    """
    if not 1 <= num_steps <= num_times:
        raise GridError(f"a grid needs 1 to {num_times} steps, one time each; got {num_steps}.")
    return tuple(round(Fraction(num_times * k, num_steps)) for k in range(num_steps, 0, -1))


def trained_times(student_steps: int) -> tuple[int, ...]:
    """Return the times that a student of so many steps trains on, falling.

    With few steps these are 1000, 750, 500 and 250, so that it can start from partial noise
    (section 3.7.1).
    """
    return trailing_times(max(4, student_steps))


def landing(t: Times, grid_steps: int, num_times: int = 1000) -> Times:
    """Return where one step of the grid of `grid_steps` lands from each t: a grid spacing lower,
    never below 0.

    t may also lie on a finer grid (section 3.7.1 of arXiv 2402.13929: the 2-step student starts at
    250, 500, 750 and 1000; from 250 it lands on 0, from 750 on 250). Raises GridError for a time
    outside 0..T.
    """
    if t.numel() and not 0 <= int(t.min()) <= int(t.max()) <= num_times:
        raise GridError(f"times must lie in 0..{num_times}; got {int(t.min())}..{int(t.max())}.")
    table = torch.from_numpy(_landings(grid_steps, num_times))
    return table[t.to("cpu", torch.int64)].to(t)


def falling_times(start: int, num_steps: int, num_times: int = 1000) -> tuple[int, ...]:
    """List the times from `start` down to the landing 0, each a step of the grid of `num_steps`
    below the last.

    From T this is the trailing grid itself. Raises GridError for a start outside 0..T.
    """
    if not 0 <= start <= num_times:
        raise GridError(f"a start must lie in 0..{num_times}; got {start}.")
    # numbers, for a plan's tensors have no values
    times, table = [start], _landings(num_steps, num_times)
    while times[-1] > 0:
        times.append(int(table[times[-1]]))
    return tuple(times)


@lru_cache(maxsize=64)
def _landings(grid_steps: int, num_times: int) -> Int[np.ndarray, " times_plus_one"]:
    """Tabulate the landing of every t in 0..T; not as a tensor, which would belong to the mode that
    it was made in.
    """
    trailing_times(grid_steps, num_times)
    spacing = Fraction(num_times, grid_steps)
    table = [max(0, round(t - spacing)) for t in range(num_times + 1)]
    # A rounded t stands for the exact point T k / M of the coarsest grid that holds it, so coarse
    # overwrites fine;
    # subtracting the spacing from the rounded t itself would miss the next grid point by one here
    # and there.
    refinements = [
        grid_steps * 2**doublings for doublings in range((num_times // grid_steps).bit_length())
    ]
    for points in reversed(refinements):
        for k in range(1, points + 1):
            exact = Fraction(num_times * k, points)
            table[round(exact)] = max(0, round(exact - spacing))
    return np.array(table)
