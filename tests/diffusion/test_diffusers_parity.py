"""The same walk as diffusers' Euler scheduler with trailing spacing, apart from its documented
start.
"""

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from twostep.diffusion import prediction_from_output, solve, trailing_times

THEIR_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def network(x, index):
    """A stand-in for a UNet: smooth, nonlinear, aware of the time and of its neighbours."""
    phase = index.to(x.dtype).view(-1, 1, 1, 1) / 1000
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, 1) + phase)


def scheduler_of(prediction_type, num_steps):
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=THEIR_NAMES[prediction_type],
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def theirs(noise, scheduler):
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x).prev_sample
    return x


def ours(start, schedule, prediction_type, num_steps):
    def denoise(x, t):
        alpha, sigma = schedule.coefficients(t, x)
        return prediction_from_output(network(x, t - 1), x, alpha, sigma, prediction_type)

    times = torch.tensor([*trailing_times(num_steps), 0])[:, None].expand(-1, len(start))
    return solve(denoise, start, times, schedule)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 32])
def test_from_their_start_the_walk_is_theirs(schedule, randn, prediction_type, num_steps):
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    expected = theirs(noise, scheduler_of(prediction_type, num_steps))
    start = noise * schedule.sigmas[-1].float()
    found = ours(start, schedule, prediction_type, num_steps)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_their_start_is_the_noise_times_sigma(schedule, randn):
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    scheduler = scheduler_of("eps", 4)
    fed = scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])
    torch.testing.assert_close(fed, 0.99767 * noise, rtol=5e-6, atol=0)
    assert float(schedule.sigmas[-1]) == pytest.approx(0.99767, abs=5e-6)


def test_from_pure_noise_the_walk_differs_by_that_start_alone(schedule, randn):
    noise = randn(2, 4, 8, 8, dtype=torch.float32)
    expected = theirs(noise, scheduler_of("x0", 4))
    pure = ours(noise, schedule, "x0", 4)
    difference = float((pure - expected).norm() / expected.norm())
    assert 1e-5 < difference < 1e-2
