"""Data drawn from N(mean, deviation^2): every walk is known in closed form, for each schedule.

Along the exact flow x_t is alpha_t mean + r_t z with r_t^2 = alpha_t^2 deviation^2 + sigma_t^2, so
noise z is carried to mean + deviation z.
"""

import math
from itertools import pairwise

import pytest
import torch

from twostep.diffusion import (
    RectifiedFlow,
    VariancePreserving,
    falling_times,
    find_sampler,
    initial_noise,
    prediction_from_output,
    seeded_noise,
    solve,
    trailing_times,
)
from twostep.diffusion.samplers import SamplerError

MEAN = 0.7
DEVIATION = 0.5

SCHEDULES = {
    "variance_preserving": VariancePreserving.scaled_linear(),
    "rectified_flow": RectifiedFlow(),
    "shifted_flow": RectifiedFlow(3.0),
}


@pytest.fixture(params=SCHEDULES)
def any_schedule(request):
    return SCHEDULES[request.param]


def grid(num_steps, batch, schedule):
    times = torch.tensor(falling_times(schedule.top, num_steps, schedule), dtype=torch.float64)
    if isinstance(schedule.top, int):
        times = times.long()
    return times[:, None].expand(-1, batch)


def scalars(t, schedule):
    """alpha and sigma of one time as numbers."""
    t = torch.tensor([t], dtype=torch.float64)
    alpha, sigma = schedule.coefficients(t, t)
    return alpha.item(), sigma.item()


def on_the_flow(z, t, schedule):
    alpha, sigma = scalars(t, schedule)
    return alpha * MEAN + math.hypot(alpha * DEVIATION, sigma) * z


def test_many_steps_reproduce_mean_and_variance(any_schedule, randn, gaussian):
    z = randn(4096, 4)
    denoise = gaussian(MEAN, DEVIATION, any_schedule)
    start = on_the_flow(z, any_schedule.top, any_schedule)
    x = solve(denoise, start, grid(500, 4096, any_schedule), any_schedule)
    assert x.mean().item() == pytest.approx(MEAN + DEVIATION * z.mean().item(), abs=5e-3)
    assert x.std().item() == pytest.approx(DEVIATION * z.std().item(), rel=1e-2)


def test_the_error_falls_as_one_over_the_number_of_steps(any_schedule, randn, gaussian):
    z = randn(64, 2)
    exact = MEAN + DEVIATION * z
    denoise = gaussian(MEAN, DEVIATION, any_schedule)
    start = on_the_flow(z, any_schedule.top, any_schedule)
    errors = []
    for num_steps in (32, 64, 128, 256):
        x = solve(denoise, start, grid(num_steps, 64, any_schedule), any_schedule)
        errors.append((x - exact).square().mean().sqrt().item())
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert errors[-1] < 0.01
    assert all(1.7 < ratio < 2.3 for ratio in ratios), ratios


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps_follow_the_analytic_map(any_schedule, randn, gaussian, num_steps):
    """One step of DDIM, or of Euler for rectified flow, is linear in x - alpha_t mean.

    With g = (x - alpha_t mean) / r_t^2 it lands on
    x_s = alpha_s mean + (alpha_s alpha_t deviation^2 + sigma_s sigma_t) g.
    """
    z = randn(8, 3)
    times = falling_times(any_schedule.top, num_steps, any_schedule)
    expected = z
    for t, s in pairwise(times):
        alpha_t, sigma_t = scalars(t, any_schedule)
        alpha_s, sigma_s = scalars(s, any_schedule)
        g = (expected - alpha_t * MEAN) / (alpha_t**2 * DEVIATION**2 + sigma_t**2)
        expected = alpha_s * MEAN + (alpha_s * alpha_t * DEVIATION**2 + sigma_s * sigma_t) * g
    denoise = gaussian(MEAN, DEVIATION, any_schedule)
    x = solve(denoise, z, grid(num_steps, 8, any_schedule), any_schedule)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


def test_a_step_of_rectified_flow_is_eulers(randn, gaussian):
    schedule = RectifiedFlow()
    x = randn(8, 3)
    t, s = 0.75, 0.5
    prediction = gaussian(MEAN, DEVIATION, schedule)(x, torch.full((8,), t, dtype=torch.float64))
    times = torch.tensor([[t], [s]], dtype=torch.float64).expand(-1, 8)
    landed = solve(gaussian(MEAN, DEVIATION, schedule), x, times, schedule)
    torch.testing.assert_close(landed, x + (s - t) * prediction.flow())


@pytest.mark.parametrize("prediction_type", ["x0", "flow"])
def test_every_type_of_a_flow_network_is_read_at_every_time(randn, gaussian, prediction_type):
    schedule = RectifiedFlow(3.0)
    exact = gaussian(MEAN, DEVIATION, schedule)

    def denoise(x, t):
        prediction = exact(x, t)
        output = prediction.x0 if prediction_type == "x0" else prediction.flow()
        alpha, sigma = schedule.coefficients(t, x)
        return prediction_from_output(output, x, alpha, sigma, prediction_type)

    z, times = randn(8, 3), grid(4, 8, schedule)
    torch.testing.assert_close(solve(denoise, z, times, schedule), solve(exact, z, times, schedule))


def test_a_waiting_item_is_asked_about_a_legal_time(any_schedule, randn, gaussian):
    asked = []

    def denoise(x, t):
        asked.extend(t.tolist())
        return gaussian(MEAN, DEVIATION, any_schedule)(x, t)

    top, middle = trailing_times(2, any_schedule)
    times = torch.tensor([[top, middle], [middle, 0], [0, 0]])
    x = randn(2, 3)
    landed = solve(denoise, x, times, any_schedule)
    assert min(asked) == pytest.approx(any_schedule.lowest)
    assert torch.isfinite(landed).all()
    alone = solve(denoise, x[1:], times[:2, 1:], any_schedule)
    torch.testing.assert_close(landed[1:], alone)


def test_euler_is_the_flow_and_draws_no_noise(any_schedule, randn, gaussian):
    def no_noise(i):
        pytest.fail("euler draws no noise")

    denoise, x = gaussian(MEAN, DEVIATION, any_schedule), randn(3, 2)
    times = grid(4, 3, any_schedule)
    walked = find_sampler("euler")(denoise, x, times, any_schedule, no_noise)
    assert torch.equal(walked, solve(denoise, x, times, any_schedule))


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_renoising_follows_the_analytic_map(any_schedule, randn, gaussian, num_steps):
    """Each x0 is mean + alpha_t deviation^2 g; the next x_s is alpha_s x0 + sigma_s eps."""
    z = randn(8, 3)
    fresh = [randn(8, 3) for _ in range(num_steps)]
    times = falling_times(any_schedule.top, num_steps, any_schedule)
    expected = z
    for i, (t, s) in enumerate(pairwise(times)):
        alpha_t, sigma_t = scalars(t, any_schedule)
        alpha_s, sigma_s = scalars(s, any_schedule)
        g = (expected - alpha_t * MEAN) / (alpha_t**2 * DEVIATION**2 + sigma_t**2)
        x0 = MEAN + alpha_t * DEVIATION**2 * g
        expected = alpha_s * x0 + sigma_s * fresh[i]
    denoise = gaussian(MEAN, DEVIATION, any_schedule)
    times = grid(num_steps, 8, any_schedule)
    x = find_sampler("renoise")(denoise, z, times, any_schedule, lambda i: fresh[i])
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


def test_renoising_with_a_perfect_student_reproduces_mean_and_variance(any_schedule, randn):
    """A distilled student maps x_t to a sample, not to the mean of all: then the spread stays."""

    def denoise(x, t):
        alpha, sigma = any_schedule.coefficients(t, x)
        scale = (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
        x0 = MEAN + DEVIATION * (x - alpha * MEAN) / scale
        return prediction_from_output(x0, x, alpha, sigma, "x0")

    z = randn(4096, 4)
    noise = seeded_noise(range(4096), z)
    times = grid(4, 4096, any_schedule)
    start = on_the_flow(z, any_schedule.top, any_schedule)
    x = find_sampler("renoise")(denoise, start, times, any_schedule, noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_fresh_noise_depends_on_seed_and_step_alone(randn):
    x = randn(3, 2, 4, dtype=torch.float32)
    together = seeded_noise([5, 6, 7], x)
    alone = seeded_noise([6], x[:1])
    assert torch.equal(together(0)[1:2], alone(0))
    assert not torch.equal(alone(0), alone(1))
    assert not torch.equal(alone(0)[0], initial_noise(6, (2, 4)))
    assert together(0).shape == x.shape
    assert seeded_noise([1, 2, 3], x.bfloat16())(0).dtype == torch.bfloat16


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(
        SamplerError, match="'heun' is not known; expected euler, renoise, dpmpp-2m or"
    ):
        find_sampler("heun")
