"""One step along the flow, and many.

A step re-mixes a prediction at a lower time: x_s = alpha_s x0 + sigma_s eps (eq 5 of arXiv
2402.13929). This is DDIM with eta 0 (arXiv 2010.02502) and the Euler step in the coordinates x /
alpha, sigma / alpha. `solve` takes such steps from time to time; it knows neither guidance nor
conditioning, both live in the `denoise` it is given.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor

from twostep.diffusion.grid import falling_times
from twostep.diffusion.prediction import Prediction
from twostep.diffusion.schedule import VariancePreserving
from twostep.diffusion.shapes import Batch, Times, Values
from twostep.errors import TwostepError

Denoise = Callable[[Tensor, Tensor], Prediction]
"""(x_t, t) -> Prediction, with everything else closed over; t is one integer per item, 1..T."""

OnStep = Callable[[int, Prediction], None]
"""Called with i and its answer after the i-th network call."""


class FlowError(TwostepError):
    """Times that cannot be walked: too few, rising, or not one per item."""


def step(prediction: Prediction, s: Times, schedule: VariancePreserving) -> Batch:
    """Return x_s = alpha_s x0 + sigma_s eps, eq 5 of arXiv 2402.13929; at s = 0 this is x0 itself."""
    alpha, sigma = schedule.coefficients(s, prediction.x0)
    return alpha * prediction.x0 + sigma * prediction.eps


def solve(
    denoise: Denoise,
    x: Batch,
    times: Int[Tensor, "points batch"],
    schedule: VariancePreserving,
    on_step: OnStep | None = None,
    keep: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Batch:
    """Follow the flow from times[0] to times[-1] with one network call per interval and return x at
    the last time.

    Each item has its own falling times; over an interval where they stand still it is left as it
    is. At t = T x must be pure noise (eq 24 of arXiv 2402.13929). `keep(x_s, s)` returns x_s with
    what is known of it put back, after every step. Raises FlowError for fewer than two points, for
    rising times, or if there is not one column per item.
    """
    _check_times(times, x)
    for i, (t, s) in enumerate(pairwise(times)):
        # An item that has arrived at 0 waits there: it is fed a legal time and its answer is
        # dropped.
        prediction = denoise(x, t.clamp(min=1))
        waits = (t == s).to(x.device).view(-1, *[1] * (x.ndim - 1))
        x = torch.where(waits, x, step(prediction, s, schedule))
        if keep is not None:
            x = keep(x, s)
        if on_step is not None:
            on_step(i, prediction)
    return x


def sample(
    denoise: Denoise,
    noise: Batch,
    num_steps: int,
    schedule: VariancePreserving,
    on_step: OnStep | None = None,
) -> Batch:
    """Follow the flow from pure noise to clean along the trailing grid, all items in the same
    `num_steps` steps.
    """
    times = torch.tensor(falling_times(schedule.num_times, num_steps, schedule.num_times))
    return solve(denoise, noise, times[:, None].expand(-1, len(noise)), schedule, on_step)


def initial_noise(seed: int, shape: tuple[int, ...]) -> Values:
    """Draw the pure noise of one image: float32 from a generator of its own on the CPU, so the same
    on every device.
    """
    return torch.randn(
        shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32
    )


def _check_times(times: Tensor, x: Tensor) -> None:
    """Refuse times that `solve` cannot walk."""
    if times.ndim != 2 or len(times) < 2 or times.shape[1] != len(x):
        raise FlowError(
            f"times must be [points, batch] with at least 2 points and batch {len(x)}; got {list(times.shape)}. "
            "Append the landing time, usually 0, and repeat the grid for every item."
        )
    if not bool((times[1:] <= times[:-1]).all()):
        raise FlowError(
            f"times must fall from point to point, noise to clean; got {times[:, 0].tolist()} for item 0."
        )
