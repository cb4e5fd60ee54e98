"""The noise schedule: SDXL's known numbers, lookups per item, the pure-noise rule."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from twostep.diffusion.schedule import ScheduleError, VariancePreserving
from twostep.errors import TwostepError


def test_sdxl_numbers(schedule):
    assert schedule.num_times == 1000
    assert float(schedule.alphas[1000] ** 2) == pytest.approx(0.00466, abs=5e-6)
    assert float(schedule.alphas[1000]) == pytest.approx(0.0683, abs=5e-5)
    assert float(schedule.sigmas[1000] / schedule.alphas[1000]) == pytest.approx(14.615, abs=5e-4)


def test_time_zero_is_clean_and_signal_falls(schedule):
    assert schedule.alphas[0] == 1 and schedule.sigmas[0] == 0
    assert bool((schedule.alphas.diff() < 0).all()) and bool((schedule.sigmas.diff() > 0).all())


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_variance_is_preserved_and_betas_are_those_of_diffusers(kind):
    schedule = getattr(VariancePreserving, kind)(num_times=1000, beta_start=0.00085, beta_end=0.012)
    theirs = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind)
    torch.testing.assert_close(
        schedule.alphas**2 + schedule.sigmas**2, torch.ones(1001, dtype=torch.float64)
    )
    torch.testing.assert_close(
        schedule.alphas[1:].float() ** 2, theirs.alphas_cumprod, rtol=3e-5, atol=0
    )


def test_from_betas_multiplies_them_up():
    schedule = VariancePreserving.from_betas(torch.tensor([0.5, 0.25]))
    assert schedule.alphas.square().tolist() == pytest.approx([1, 0.5, 0.375])
    assert schedule.sigmas.square().tolist() == pytest.approx([0, 0.5, 0.625])


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [-0.1], [float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ScheduleError, match="between 0 and 1"):
        VariancePreserving.from_betas(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coefficients_follow_each_item_and_the_dtype(schedule, dtype):
    like = torch.zeros(3, 4, 8, 8, dtype=dtype)
    alpha, sigma = schedule.coefficients(torch.tensor([0, 250, 1000], dtype=torch.int32), like)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1) and alpha.dtype == sigma.dtype == dtype
    torch.testing.assert_close(alpha.flatten(), schedule.alphas[[0, 250, 1000]].to(dtype))
    torch.testing.assert_close(sigma.flatten(), schedule.sigmas[[0, 250, 1000]].to(dtype))


def test_coefficients_of_an_empty_batch(schedule):
    alpha, _ = schedule.coefficients(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    assert alpha.shape == (0, 1)


@pytest.mark.parametrize("times", [[-1, 5], [5, 1001]])
def test_a_time_outside_is_named(schedule, times):
    with pytest.raises(ScheduleError, match=rf"0\.\.1000; got {min(times)}\.\.{max(times)}"):
        schedule.coefficients(torch.tensor(times), torch.zeros(2, 4))
    assert issubclass(ScheduleError, TwostepError)


def test_noise_is_mixed_per_item_and_pure_at_the_top(schedule, randn):
    x0, eps = randn(4, 3, 5), randn(4, 3, 5)
    x_t = schedule.add_noise(x0, eps, torch.tensor([0, 1, 999, 1000]))
    torch.testing.assert_close(x_t[0], x0[0], rtol=0, atol=0)
    for item, t in ((1, 1), (2, 999)):
        torch.testing.assert_close(
            x_t[item], schedule.alphas[t] * x0[item] + schedule.sigmas[t] * eps[item]
        )
    assert torch.equal(x_t[3], eps[3])


def test_the_top_lets_nothing_of_the_picture_through(schedule, randn):
    x0 = randn(2, 3).requires_grad_()
    schedule.add_noise(x0, randn(2, 3), torch.tensor([1000, 500])).sum().backward()
    assert x0.grad is not None
    assert torch.equal(x0.grad[0], torch.zeros(3).double()) and bool((x0.grad[1] > 0).all())


def test_tables_cannot_be_swapped(schedule):
    with pytest.raises(AttributeError):
        schedule.alphas = schedule.sigmas
