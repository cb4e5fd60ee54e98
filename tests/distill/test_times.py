"""Laws of random times: uniform, and logit-normal in the noise of any schedule."""

import math

import pytest
import torch

from twostep.diffusion import RectifiedFlow, VariancePreserving
from twostep.distill.times import draw_logit_normal_times, draw_uniform_times

GENERATOR_SEED = 0
COUNT = 20_000


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(GENERATOR_SEED)


def log_ratios(t: torch.Tensor, schedule: object) -> torch.Tensor:
    alpha, sigma = schedule.coefficients(t, t.double())
    return (sigma / alpha).log()


@pytest.mark.parametrize("schedule", [VariancePreserving.scaled_linear(), RectifiedFlow(3.0)])
def test_the_logit_normal_law_is_one_of_the_noise(
    schedule: object, generator: torch.Generator
) -> None:
    t = draw_logit_normal_times(COUNT, generator, schedule, mean=-0.5, deviation=0.7)
    ratios = log_ratios(t, schedule)
    assert ratios.mean().item() == pytest.approx(-0.5, abs=0.03)
    assert ratios.std().item() == pytest.approx(0.7, abs=0.03)


def test_in_a_rectified_flow_it_is_the_logit_normal_law_itself(generator: torch.Generator) -> None:
    t = draw_logit_normal_times(COUNT, generator, RectifiedFlow(), mean=1.0, deviation=1.0)
    share_below_half = (t < 0.5).double().mean().item()
    # P(logit(u) < 0) of N(1, 1).
    assert share_below_half == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=0.01)


def test_pure_noise_is_never_drawn(generator: torch.Generator) -> None:
    schedule = VariancePreserving.scaled_linear()
    t = draw_logit_normal_times(COUNT, generator, schedule, mean=9.0, deviation=1.0)
    assert t.max().item() == 999


def test_uniform_real_times_fill_their_part(generator: torch.Generator) -> None:
    t = draw_uniform_times(COUNT, generator, RectifiedFlow(), lowest_share=0.2, highest_share=0.6)
    assert 0.2 <= t.min().item() < 0.21
    assert 0.59 < t.max().item() <= 0.6
    assert t.mean().item() == pytest.approx(0.4, abs=0.01)
