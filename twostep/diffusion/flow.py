"""One step along the flow, and a walk of many.

A step mixes a prediction again at a lower time: x_s = alpha_s x0 + sigma_s eps (eq 5 of arXiv
2402.13929). This is DDIM with eta 0 (arXiv 2010.02502), the Euler step of the probability flow in
the coordinates x / alpha and sigma / alpha, and for rectified flow Euler's step itself. A walk
takes such steps from time to time. It knows neither guidance nor conditioning: both live in the
`denoise` that it is given.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Real
from torch import Tensor

from twostep.diffusion.grid import falling_times, time_tensor
from twostep.diffusion.prediction import Prediction
from twostep.diffusion.schedule import Schedule
from twostep.diffusion.shapes import Batch, Times, Values, as_column
from twostep.errors import TwostepError

Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t, t) -> Prediction, with everything else closed over; t is one time above 0 per item."""

OnStep = Callable[[int, Prediction], None]
"""Called with i and the prediction after the i-th network call, counted from 0."""

Keep = Callable[[Tensor, Tensor], Tensor]
"""(x_s, s) -> x_s in which known parts have been put back."""

Move = Callable[[int, Prediction, Tensor], Tensor]
"""(i, prediction, s) -> x_s: how the i-th step gets from a prediction to the next time."""


class FlowError(TwostepError):
    """Times that cannot be walked: too few, rising, or not one per item."""


def step(prediction: Prediction, s: Times, schedule: Schedule) -> Batch:
    """Return x_s = alpha_s x0 + sigma_s eps, eq 5 of arXiv 2402.13929; at s = 0 this is x0."""
    alpha, sigma = schedule.coefficients(s, prediction.x0)
    return alpha * prediction.x0 + sigma * prediction.eps


def solve(
    denoise: Denoise,
    x: Batch,
    times: Real[Tensor, "points batch"],
    schedule: Schedule,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Batch:
    """Follow the flow from times[0] to times[-1] with one network call per interval.

    Args:
        denoise: what predicts x0 and eps.
        x: the items at times[0]; at the top this must be pure noise (eq 24 of arXiv 2402.13929).
        times: falling times of each item, at least two. Over an interval in which they stand still
            an item is left as it is.
        schedule: whose times they are.
        on_step: called after every network call.
        keep: applied to x after every step.

    Returns:
        The items at times[-1].

    Raises:
        FlowError: there are fewer than two points, they rise, or there is not a column per item.
    """

    def move(i: int, prediction: Prediction, s: Tensor) -> Tensor:
        return step(prediction, s, schedule)

    return walk(denoise, x, times, schedule, move=move, on_step=on_step, keep=keep)


def walk(
    denoise: Denoise,
    x: Tensor,
    times: Tensor,
    schedule: Schedule,
    move: Move,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Go from times[0] to times[-1] as `solve` does, by another kind of step.

    Args:
        denoise: what predicts x0 and eps.
        x: the items at times[0], [batch, ...].
        times: falling times of each item, [points, batch] with at least two points.
        schedule: whose times they are.
        move: how a step gets from a prediction to the next time.
        on_step: called after every network call.
        keep: applied to x after every step.

    Raises:
        FlowError: as in `solve`.
    """
    _check_times(times, x)
    for i, (t, s) in enumerate(pairwise(times)):
        # An item that has arrived at 0 waits there: the network is asked about a legal time, and
        # its answer is dropped.
        prediction = denoise(x, t.masked_fill(t == 0, schedule.lowest))
        x = torch.where(as_column(t == s, x), x, move(i, prediction, s))
        if keep is not None:
            x = keep(x, s)
        if on_step is not None:
            on_step(i, prediction)
    return x


def sample(
    denoise: Denoise,
    noise: Batch,
    num_steps: int,
    schedule: Schedule,
    on_step: OnStep | None = None,
) -> Batch:
    """Follow the flow from pure noise to clean data along the trailing grid of so many steps."""
    times = time_tensor(falling_times(schedule.top, num_steps, schedule))
    columns = times[:, None].expand(-1, len(noise))
    return solve(denoise, noise, columns, schedule, on_step=on_step)


def initial_noise(seed: int, shape: tuple[int, ...]) -> Values:
    """Draw the pure noise of one item in float32.

    It comes from a generator of its own on the CPU, so it is the same on every device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _check_times(times: Tensor, x: Tensor) -> None:
    """Refuse times that cannot be walked: FlowError."""
    if times.ndim != 2 or len(times) < 2 or times.shape[1] != len(x):
        raise FlowError(
            f"times must be [points, batch] with at least 2 points and batch {len(x)}; "
            f"got {list(times.shape)}. "
            "Append the landing time, usually 0, and repeat the grid for every item."
        )
    if not bool((times[1:] <= times[:-1]).all()):
        raise FlowError(
            "times must fall from point to point, noise to clean; "
            f"got {times[:, 0].tolist()} for item 0."
        )
