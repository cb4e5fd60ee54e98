"""Trailing grids: known values, nesting, landings between grids, agreement with diffusers."""

from itertools import pairwise

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from twostep.diffusion import (
    GridError,
    VariancePreserving,
    falling_times,
    landing,
    trailing_times,
    trained_times,
)


@pytest.mark.parametrize(
    ("num_steps", "indices"),
    [
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
        (4, [999, 749, 499, 249]),
        (2, [999, 499]),
        (1, [999]),
    ],
)
def test_the_published_grids(num_steps, indices):
    assert [t - 1 for t in trailing_times(num_steps)] == indices


@pytest.mark.parametrize("num_steps", [64, 32, 16, 8, 4, 2, 1])
def test_grids_nest_from_128_down(num_steps):
    assert trailing_times(2 * num_steps)[::2] == trailing_times(num_steps)


@pytest.mark.parametrize(
    "num_steps", [1, 2, 3, 4, 5, 6, 7, 8, 16, 25, 30, 32, 50, 64, 100, 128, 1000]
)
def test_the_indices_of_diffusers(num_steps):
    scheduler = EulerDiscreteScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert [t - 1 for t in trailing_times(num_steps)] == scheduler.timesteps.int().tolist()


@pytest.mark.parametrize("num_steps", range(1, 1001, 37))
def test_times_fall_from_the_top_and_stay_positive(num_steps):
    times = trailing_times(num_steps)
    assert len(times) == num_steps and times[0] == 1000 and times[-1] >= 1
    assert all(t > s for t, s in pairwise(times))


@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_impossible_grids_are_refused(num_steps):
    with pytest.raises(GridError, match=f"1 to 1000 steps.*got {num_steps}"):
        trailing_times(num_steps)


@pytest.mark.parametrize("grid_steps", [1, 2, 3, 4, 7, 8, 30, 32, 50, 128, 500, 1000])
def test_on_its_own_grid_a_step_lands_on_the_next_point(grid_steps):
    times = trailing_times(grid_steps)
    assert tuple(landing(torch.tensor(times), grid_steps).tolist()) == (*times[1:], 0)


def test_a_few_step_student_lands_from_every_time_it_was_trained_at():
    trained = torch.tensor([1000, 750, 500, 250])
    assert landing(trained, 4).tolist() == [750, 500, 250, 0]
    assert landing(trained, 2).tolist() == [500, 250, 0, 0]
    assert landing(trained, 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(("fine", "coarse"), [(128, 32), (32, 8), (128, 8), (8, 4), (8, 2), (4, 1)])
def test_teacher_steps_add_up_to_one_student_step(fine, coarse):
    t = torch.tensor(trailing_times(fine))
    s = t
    for _ in range(fine // coarse):
        s = landing(s, fine)
    assert torch.equal(s, landing(t, coarse))


def test_between_all_grids_a_step_still_goes_down():
    t = torch.arange(1, 1001)
    for grid_steps in (1, 3, 32, 999, 1000):
        s = landing(t, grid_steps)
        assert bool((s < t).all()) and bool((s >= 0).all())
        assert bool(((t - s) <= 1000 / grid_steps + 1).all())


def test_landing_stays_at_zero_and_keeps_the_integer_type():
    t = torch.tensor([0, 1000], dtype=torch.int32)
    assert landing(t, 4).tolist() == [0, 750] and landing(t, 4).dtype == torch.int32


def test_other_tops():
    schedule = VariancePreserving.linear(num_times=10)
    assert trailing_times(4, schedule) == (10, 8, 5, 2)
    assert landing(torch.tensor([10, 8, 5, 2]), 4, schedule).tolist() == [8, 5, 2, 0]
    assert falling_times(10, 4, schedule) == (10, 8, 5, 2, 0)


def test_sdxls_schedule_has_the_times_that_are_assumed_without_one(schedule):
    for num_steps in (1, 4, 7, 32):
        assert trailing_times(num_steps, schedule) == trailing_times(num_steps)
        assert trained_times(num_steps, schedule) == trained_times(num_steps)
        assert falling_times(333, num_steps, schedule) == falling_times(333, num_steps)
        t = torch.arange(1001)
        assert torch.equal(landing(t, num_steps, schedule), landing(t, num_steps))


def test_landing_refuses_foreign_times_and_grids():
    with pytest.raises(GridError, match=r"0\.\.1000; got 0\.\.1001"):
        landing(torch.tensor([0, 1001]), 4)
    with pytest.raises(GridError, match="1 to 1000 steps"):
        landing(torch.tensor([1000]), 0)
