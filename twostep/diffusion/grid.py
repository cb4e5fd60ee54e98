"""Which times a sampler visits, and where a step lands.

The trailing grid of N steps has its times at the shares 1, (N - 1)/N, ..., 1/N of the way from
clean data to pure noise; the last step lands on 0 (section 3.5 of arXiv 2402.13929). Grids nest:
every time of N steps is one of 2N steps. Where times are integers they are rounded half to even.
Every function takes a schedule, and without one assumes the integer times 1..1000 of SDXL.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int

from twostep.diffusion.schedule import Schedule
from twostep.diffusion.shapes import Time, Times
from twostep.errors import TwostepError

DEFAULT_TOP = 1000
"""The top time where no schedule is given."""

MAX_REAL_STEPS = 1000
"""The most steps of a grid of real times."""

_SNAP = 1e-3
"""A real time this near to a point of the grid, in grid spacings, is taken for that point.

Times that are kept in float32 are off by less than a tenth of this, even on the finest grid.
"""


class GridError(TwostepError):
    """A number of steps, or a time, for which there is no grid."""


def time_tensor(times: Sequence[Time]) -> torch.Tensor:
    """Return times as a tensor: integers as such, real times in float32, whatever the default."""
    tensor = torch.tensor(times)
    return tensor.float() if tensor.is_floating_point() else tensor


def time_table(times: Sequence[Time], schedule: Schedule) -> torch.Tensor:
    """Return what a run of steps must know of its times, [3, times] in float32, on the CPU.

    Rows are the numbers that a network is fed, signal and noise. A network is not called at the
    landing, the last time, where the first row is 0.

    Args:
        times: falling, the landing included.
        schedule: whose times they are.
    """
    all_times = time_tensor(times)
    signal, noise = schedule.coefficients(all_times, torch.zeros(len(times)))
    fed = torch.zeros(len(times))
    fed[:-1] = schedule.network_time(all_times[:-1])
    return torch.stack([fed, signal, noise])


def trailing_times(num_steps: int, schedule: Schedule | None = None) -> tuple[Time, ...]:
    """Return the times of the trailing grid, falling from the top, without the landing 0.

    Args:
        num_steps: 1..T for integer times, 1..1000 for real ones.
        schedule: whose times they are.

    Raises:
        GridError: there is no grid of so many steps.
    """
    top = _top(schedule)
    _check_steps(num_steps, top)
    shares = [Fraction(k, num_steps) for k in range(num_steps, 0, -1)]
    if schedule is None:
        return tuple(round(top * share) for share in shares)
    return tuple(schedule.time_at(share) for share in shares)


def floored_times(num_steps: int, top: int = DEFAULT_TOP) -> tuple[int, ...]:
    """Return the times of ComfyUI's scheduler `simple`: whole times, their distance rounded down.

    They are those of the trailing grid where `num_steps` divides the top, and some are one higher
    elsewhere.

    Args:
        num_steps: 1..T.
        top: T.

    Raises:
        GridError: there is no grid of so many steps.
    """
    _check_steps(num_steps, top)
    spacing = top / num_steps
    return tuple(top - int(k * spacing) for k in range(num_steps))


def trained_times(student_steps: int, schedule: Schedule | None = None) -> tuple[Time, ...]:
    """Return the times that a student of so many steps is trained at, falling.

    These are at least 4, so that students of one and two steps can start from partial noise
    (section 3.7.1 of arXiv 2402.13929): 1000, 750, 500 and 250 for SDXL.
    """
    return trailing_times(max(4, student_steps), schedule)


def landing(t: Times, grid_steps: int, schedule: Schedule | None = None) -> Times:
    """Return where one step of the grid lands from each t: a grid spacing lower, never below 0.

    t may also lie on a finer grid. The 2-step student starts at 250, 500, 750 and 1000 (section
    3.7.1 of arXiv 2402.13929): from 250 it lands on 0, from 750 on 250.

    Args:
        t: times in 0..top.
        grid_steps: number of steps of the grid whose spacing is the length of the step.
        schedule: whose times they are.

    Raises:
        GridError: a time lies outside 0..top, or there is no grid of so many steps.
    """
    top = _top(schedule)
    _check_steps(grid_steps, top)
    if t.numel() and not 0 <= t.min().item() <= t.max().item() <= top:
        raise GridError(f"times must lie in 0..{top}; got {t.min().item()}..{t.max().item()}.")
    if schedule is None or isinstance(top, int):
        table = torch.from_numpy(_integer_landings(grid_steps, int(top)))
        return table[t.to("cpu", torch.int64)].to(t)
    points = [_real_landing(float(time), grid_steps, schedule) for time in t.tolist()]
    return torch.tensor(points, dtype=t.dtype, device=t.device)


def falling_times(
    start: Time, num_steps: int, schedule: Schedule | None = None
) -> tuple[Time, ...]:
    """Return the times from `start` down to the landing 0, each one step of the grid apart.

    From the top this is the trailing grid with its landing.

    Args:
        start: time in 0..top.
        num_steps: number of steps of the grid whose spacing is the length of a step.
        schedule: whose times they are.

    Raises:
        GridError: the start lies outside 0..top, or there is no grid of so many steps.
    """
    top = _top(schedule)
    _check_steps(num_steps, top)
    if not 0 <= start <= top:
        raise GridError(f"a start must lie in 0..{top}; got {start}.")
    # Python's numbers, not tensors: tensors have no values while a plan is made.
    times = [start]
    while times[-1] > 0:
        if schedule is None or isinstance(top, int):
            times.append(int(_integer_landings(num_steps, int(top))[int(times[-1])]))
        else:
            times.append(_real_landing(times[-1], num_steps, schedule))
    return tuple(times)


def _top(schedule: Schedule | None) -> Time:
    return DEFAULT_TOP if schedule is None else schedule.top


def _check_steps(num_steps: int, top: Time) -> None:
    most = top if isinstance(top, int) else MAX_REAL_STEPS
    if not 1 <= num_steps <= most:
        raise GridError(f"a grid needs 1 to {most} steps, one time each; got {num_steps}.")


def _real_landing(t: Time, grid_steps: int, schedule: Schedule) -> Time:
    """Return where one step of the grid lands from a real time."""
    position = schedule.share_at(t) * grid_steps
    nearest = round(position)
    if abs(position - nearest) < _SNAP:
        # From a point of the grid to the next one, which is exactly that of `trailing_times`.
        return schedule.time_at(Fraction(max(0, nearest - 1), grid_steps))
    return schedule.time_at(Fraction(max(0.0, position - 1) / grid_steps))


@lru_cache(maxsize=64)
def _integer_landings(grid_steps: int, top: int) -> Int[np.ndarray, " times_plus_one"]:
    """Tabulate the landing of every integer time in 0..top.

    The table is no tensor, because a tensor belongs to the torch mode that it was made in, and the
    cache would carry it out of that mode.
    """
    spacing = Fraction(top, grid_steps)
    table = [max(0, round(t - spacing)) for t in range(top + 1)]
    # A rounded time t stands for the exact point top k / M of the coarsest grid that has it, so
    # coarse grids overwrite fine ones. Subtracting the spacing from the rounded t itself would miss
    # the next point of the grid by one here and there.
    num_doublings = (top // grid_steps).bit_length()
    refinements = [grid_steps * 2**doublings for doublings in range(num_doublings)]
    for points in reversed(refinements):
        for k in range(1, points + 1):
            exact = Fraction(top * k, points)
            table[round(exact)] = max(0, round(exact - spacing))
    return np.array(table)
