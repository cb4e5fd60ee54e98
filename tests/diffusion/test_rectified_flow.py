"""Rectified flow: straight paths at real times, shifted grids, and what a network is fed."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from twostep.diffusion import (
    GridError,
    RectifiedFlow,
    Schedule,
    VariancePreserving,
    falling_times,
    landing,
    make_schedule,
    prediction_from_output,
    sample,
    trailing_times,
    trained_times,
)
from twostep.diffusion.schedule import ScheduleError

SHIFTS = [0.5, 1.0, 3.0]


def test_both_schedules_are_schedules(schedule):
    assert isinstance(schedule, Schedule)
    assert isinstance(RectifiedFlow(), Schedule)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_coefficients_are_straight_and_follow_each_item(dtype):
    like = torch.zeros(3, 4, 8, 8, dtype=dtype)
    alpha, sigma = RectifiedFlow().coefficients(torch.tensor([0.0, 0.25, 1.0]), like)
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha.flatten().tolist() == [1.0, 0.75, 0.0]
    assert sigma.flatten().tolist() == [0.0, 0.25, 1.0]


def test_noise_is_mixed_per_item_and_pure_at_the_top(randn):
    x0, eps = randn(3, 2, 5), randn(3, 2, 5)
    x_t = RectifiedFlow().add_noise(x0, eps, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * eps[1])
    assert torch.equal(x_t[2], eps[2])


def test_a_network_is_fed_its_own_number(schedule):
    assert schedule.network_time(torch.tensor([0, 1, 1000])).tolist() == [0, 0, 999]
    assert RectifiedFlow().network_time(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 500, 1000]


@pytest.mark.parametrize("times", [[-0.1, 0.5], [0.5, 1.5], [0.5, float("nan")]])
def test_a_time_outside_is_named(times):
    with pytest.raises(ScheduleError, match=r"0\.\.1; got"):
        RectifiedFlow().coefficients(torch.tensor(times), torch.zeros(2, 4))


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_impossible_shifts_are_refused(shift):
    with pytest.raises(ScheduleError, match="above 0; got"):
        RectifiedFlow(shift)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 28])
def test_the_shifted_grid_is_that_of_diffusers(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    # Theirs without spacing of its own: the shares are given, the shift is applied by diffusers.
    scheduler.set_timesteps(sigmas=[k / num_steps for k in range(num_steps, 0, -1)])
    ours = trailing_times(num_steps, RectifiedFlow(shift))
    assert ours == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6)
    network_times = RectifiedFlow(shift).network_time(torch.tensor(ours))
    torch.testing.assert_close(network_times, scheduler.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shift", SHIFTS)
def test_grids_start_at_the_top_and_nest(shift):
    schedule = RectifiedFlow(shift)
    for num_steps in (1, 2, 4, 8):
        times = trailing_times(num_steps, schedule)
        assert times[0] == 1.0
        assert all(t > s > 0 for t, s in pairwise(times))
        assert trailing_times(2 * num_steps, schedule)[::2] == times
    assert trained_times(1, schedule) == trailing_times(4, schedule)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_steps", [1, 3, 4, 50, 1000])
def test_on_its_own_grid_a_step_lands_on_the_next_point(shift, dtype, num_steps):
    schedule = RectifiedFlow(shift)
    times = torch.tensor(trailing_times(num_steps, schedule), dtype=dtype)
    expected = torch.cat([times[1:], times.new_zeros(1)])
    landed = landing(times, num_steps, schedule)
    assert landed.dtype == dtype
    assert torch.equal(landed, expected)


def test_a_few_step_student_lands_from_every_time_it_was_trained_at():
    schedule = RectifiedFlow(3.0)
    trained = torch.tensor(trained_times(2, schedule))
    middle, low = schedule.time_at(Fraction(1, 2)), schedule.time_at(Fraction(1, 4))
    assert landing(trained, 2, schedule).tolist() == pytest.approx([middle, low, 0, 0])
    assert landing(trained, 1, schedule).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shift", SHIFTS)
def test_shares_and_times_are_inverse(shift):
    schedule = RectifiedFlow(shift)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert schedule.share_at(schedule.time_at(share)) == pytest.approx(share)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 50])
def test_falling_times_from_the_top_are_the_grid(shift, num_steps):
    schedule = RectifiedFlow(shift)
    assert falling_times(1.0, num_steps, schedule) == (*trailing_times(num_steps, schedule), 0)


def test_falling_times_from_between_take_whole_steps():
    schedule = RectifiedFlow()
    assert falling_times(0.6, 4, schedule) == pytest.approx((0.6, 0.35, 0.1, 0))
    assert falling_times(0, 4, schedule) == (0,)


def test_impossible_grids_and_times_are_refused():
    schedule = RectifiedFlow()
    with pytest.raises(GridError, match=r"1 to 1000 steps.*got 1001"):
        trailing_times(1001, schedule)
    with pytest.raises(GridError, match=r"lie in 0\.\.1\.0; got 2"):
        falling_times(2.0, 4, schedule)
    with pytest.raises(GridError, match=r"lie in 0\.\.1\.0; got 0\.5\.\.1\.5"):
        landing(torch.tensor([0.5, 1.5]), 4, schedule)


def test_a_schedule_is_made_of_its_description(randn):
    like = randn(1, 3)
    made = make_schedule(
        "variance_preserving",
        betas="linear",
        beta_start=0.001,
        beta_end=0.02,
        num_times=500,
    )
    assert isinstance(made, VariancePreserving)
    expected = VariancePreserving.linear(500, 0.001, 0.02)
    assert torch.equal(made.alphas, expected.alphas)
    made = make_schedule("rectified_flow", shift=3.0)
    assert made.time_at(Fraction(1, 2)) == 0.75
    assert made.coefficients(torch.tensor([0.5]), like)[0].item() == 0.5
    with pytest.raises(ScheduleError, match="'karras' is not known; expected variance_preserving"):
        make_schedule("karras")
    with pytest.raises(ScheduleError, match="'sine' are not known; expected scaled_linear"):
        make_schedule(
            "variance_preserving", betas="sine", beta_start=0.1, beta_end=0.2, num_times=10
        )


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_walk_is_that_of_diffusers(randn, shift):
    def network(x, time):
        return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1) + time.view(-1, 1, 1, 1) / 1000)

    schedule, noise = RectifiedFlow(shift), randn(2, 4, 8, 8, dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    expected = noise
    for time in scheduler.timesteps:
        output = network(expected, time.expand(len(noise)))
        expected = scheduler.step(output, time, expected).prev_sample

    def denoise(x, t):
        alpha, sigma = schedule.coefficients(t, x)
        return prediction_from_output(network(x, schedule.network_time(t)), x, alpha, sigma, "flow")

    torch.testing.assert_close(sample(denoise, noise, 4, schedule), expected, rtol=1e-5, atol=1e-5)
