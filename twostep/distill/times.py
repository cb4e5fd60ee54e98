"""Laws by which random times are drawn, one per item, in any schedule.

Few-step methods re-noise what a student made and ask another network about it; at which times
differs from method to method. Everything is drawn on the CPU for the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from twostep.diffusion import Schedule
from twostep.diffusion.shapes import Time, Times

_NUM_REAL_TIMES = 1000
"""How finely real times are looked up by their noise."""


def draw_uniform_times(
    count: int,
    generator: torch.Generator,
    schedule: Schedule,
    *,
    lowest_share: float = 0.0,
    highest_share: float = 1.0,
) -> Times:
    """Draw times that are uniform over a part of the way from clean data to pure noise.

    Args:
        count: number of items.
        generator: of the random numbers.
        schedule: whose times they are. Integer times lie in 1..T, never at 0.
        lowest_share: where the part begins, as a share of the way in 0..1.
        highest_share: where it ends; the time there is drawn too.
    """
    if isinstance(schedule.top, int):
        low = max(1, math.ceil(lowest_share * schedule.top))
        high = math.floor(highest_share * schedule.top)
        return torch.randint(low, high + 1, (count,), generator=generator)
    shares = lowest_share + (highest_share - lowest_share) * torch.rand(count, generator=generator)
    times = torch.tensor([schedule.time_at(share) for share in shares.tolist()])
    return times.clamp(min=float(schedule.lowest))


def draw_weighted_times(
    times: Sequence[Time], weights: Sequence[float], count: int, generator: torch.Generator
) -> Times:
    """Draw one of a few times per item.

    Args:
        times: to draw from.
        weights: how often each is drawn; they need not add up to 1.
        count: number of items.
        generator: of the random numbers.
    """
    shares = torch.tensor(weights, dtype=torch.float32)
    drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
    return torch.tensor(times)[drawn]


def draw_logit_normal_times(
    count: int,
    generator: torch.Generator,
    schedule: Schedule,
    *,
    mean: float,
    deviation: float,
) -> Times:
    """Draw times whose noise follows the logit-normal law of rectified flows.

    The law of arXiv 2403.03206 (section 3.1) draws the time u of a straight path with logit(u)
    normal. There sigma / alpha = u / (1 - u), so log(sigma / alpha) is normal; and this is said of
    any schedule: the time is taken at which log(sigma_t / alpha_t) is nearest to what was drawn.

    Args:
        count: number of items.
        generator: of the random numbers.
        schedule: whose times they are. The top, where nothing is left of the data, is not drawn.
        mean: of log(sigma / alpha); 0 is as much noise as data, higher is noisier.
        deviation: of log(sigma / alpha).
    """
    wished = mean + deviation * torch.randn(count, generator=generator)
    candidates = _times_below_the_top(schedule)
    alpha, sigma = schedule.coefficients(candidates, candidates.double())
    ratios = (sigma / alpha).log().to(wished)
    after = torch.searchsorted(ratios, wished).clamp(1, len(ratios) - 1)
    is_nearer_before = wished - ratios[after - 1] < ratios[after] - wished
    return candidates[torch.where(is_nearer_before, after - 1, after)]


def _times_below_the_top(schedule: Schedule) -> Tensor:
    """Return rising times above 0 and below the top, fine enough to look noise up."""
    if isinstance(schedule.top, int):
        return torch.arange(1, schedule.top)
    shares = torch.arange(1, _NUM_REAL_TIMES) / _NUM_REAL_TIMES
    return torch.tensor([schedule.time_at(share) for share in shares.tolist()])
