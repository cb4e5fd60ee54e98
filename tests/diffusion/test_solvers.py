"""The multistep solvers: diffusers' own numbers, the order of their error, items that wait."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from twostep.diffusion import (
    RectifiedFlow,
    VariancePreserving,
    falling_times,
    find_sampler,
    prediction_from_output,
    solve,
)
from twostep.diffusion.samplers import SOLVERS

MEAN, DEVIATION = 0.7, 0.5
THEIRS = {"dpmpp-2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
THEIR_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def no_noise(i):
    pytest.fail("a solver draws no noise")


def follow(name, denoise, x, times, schedule):
    return find_sampler(name)(denoise, x, times, schedule, no_noise)


def grid(num_steps, batch, schedule):
    times = torch.tensor(falling_times(schedule.top, num_steps, schedule))
    return times[:, None].expand(-1, batch)


def network(x, index):
    """A stand-in for a UNet: smooth, nonlinear, aware of the time and of its neighbours."""
    phase = index.to(x.dtype).view(-1, 1, 1, 1) / 1000
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, 1) + phase)


@pytest.mark.parametrize("prediction_type", THEIR_NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("name", THEIRS)
def test_the_walk_is_that_of_diffusers(name, num_steps, prediction_type, schedule, randn):
    """Theirs begins at 0.99767 times pure noise in no coordinate: both start from the same x."""
    noise = randn(2, 4, 8, 8)
    scheduler = THEIRS[name](
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=THEIR_NAMES[prediction_type],
        solver_order=2,
    )
    scheduler.set_timesteps(num_steps)
    x = noise
    for index in scheduler.timesteps:
        output = network(x, index.expand(len(x)))
        x = scheduler.step(output, index, x).prev_sample

    def denoise(x, t):
        alpha, sigma = schedule.coefficients(t, x)
        return prediction_from_output(network(x, t - 1), x, alpha, sigma, prediction_type)

    found = follow(name, denoise, noise, grid(num_steps, 2, schedule), schedule)
    # Their sigmas are kept in float32.
    assert float((found - x).norm() / x.norm()) < 2e-5


@pytest.mark.parametrize(
    "schedule", [VariancePreserving.scaled_linear(), RectifiedFlow(), RectifiedFlow(3.0)]
)
@pytest.mark.parametrize("name", THEIRS)
def test_the_error_falls_as_the_square_of_the_step(name, schedule, randn, gaussian):
    """Of Gaussian data the flow carries noise z from time t to s in closed form."""
    z, denoise = randn(64, 2), gaussian(MEAN, DEVIATION, schedule)

    def exact(t):
        t = t.expand(64)
        alpha, sigma = schedule.coefficients(t, z)
        return alpha * MEAN + (alpha**2 * DEVIATION**2 + sigma**2).sqrt() * z

    def error(solver, num_steps):
        """From 80 % of the way down to 20 %, over equal steps."""
        shares = torch.linspace(0.8, 0.2, num_steps + 1, dtype=torch.float64)
        times = torch.tensor([schedule.time_at(share) for share in shares.tolist()])
        x = follow(solver, denoise, exact(times[0]), times[:, None].expand(-1, 64), schedule)
        return (x - exact(times[-1])).square().mean().sqrt().item()

    errors = [error(name, num_steps) for num_steps in (12, 24, 48)]
    assert all(fine < 0.4 * error("euler", n) for n, fine in zip((12, 24, 48), errors, strict=True))
    # A fourth of the step: a sixteenth of the error, where Euler's falls to a fourth.
    assert errors[0] / errors[2] > 11, errors


@pytest.mark.parametrize("name", SOLVERS)
def test_each_item_walks_its_own_times_and_waits(name, schedule, randn, gaussian):
    denoise, x = gaussian(MEAN, DEVIATION, schedule), randn(3, 2)
    columns = ([1000, 700, 400, 100, 0], [500, 500, 500, 250, 0], [700, 400, 0, 0, 0])
    alone = ([1000, 700, 400, 100, 0], [500, 250, 0], [700, 400, 0])
    together = follow(name, denoise, x, torch.tensor(columns).T, schedule)
    for item, column in enumerate(alone):
        times = torch.tensor(column)[:, None]
        one = follow(name, denoise, x[item : item + 1], times, schedule)
        torch.testing.assert_close(together[item : item + 1], one)


@pytest.mark.parametrize("name", THEIRS)
def test_known_parts_are_put_back_and_every_call_is_told(name, schedule, randn, gaussian):
    x, denoise = randn(2, 3), gaussian(MEAN, DEVIATION, schedule)
    told = []

    def keep(x, s):
        x = x.clone()
        x[:, 0] = 5.0
        return x

    landed = find_sampler(name)(
        denoise,
        x,
        grid(4, 2, schedule),
        schedule,
        no_noise,
        on_step=lambda i, prediction: told.append(i),
        keep=keep,
    )
    assert told == [0, 1, 2, 3]
    assert torch.equal(landed[:, 0], torch.full((2,), 5.0, dtype=torch.float64))
    assert torch.isfinite(landed).all()


def test_the_solvers_have_names_and_euler_is_the_flow(schedule, randn, gaussian):
    assert SOLVERS == ("euler", "dpmpp-2m", "unipc")
    x, denoise = randn(2, 3), gaussian(MEAN, DEVIATION, schedule)
    times = grid(4, 2, schedule)
    assert torch.equal(
        follow("euler", denoise, x, times, schedule), solve(denoise, x, times, schedule)
    )
