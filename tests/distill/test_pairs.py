"""Transitions: the student's and the teacher's start and end at the same times."""

import pytest
import torch

from twostep.diffusion import Prediction, VariancePreserving, landing
from twostep.distill.pairs import (
    draw_noised_times,
    draw_times,
    noise_landed,
    teacher_landing,
    trained_times,
)

SCHEDULE = VariancePreserving.scaled_linear()


def test_few_step_students_train_where_image_to_image_starts() -> None:
    assert trained_times(8) == (1000, 875, 750, 625, 500, 375, 250, 125)
    assert trained_times(4) == trained_times(2) == trained_times(1) == (1000, 750, 500, 250)


def test_every_trained_time_is_drawn() -> None:
    drawn = draw_times(2, 400, torch.Generator().manual_seed(0), SCHEDULE)
    assert sorted(set(drawn.tolist())) == [250, 500, 750, 1000]


@pytest.mark.parametrize(
    ("student", "teacher"), [(32, 128), (8, 32), (4, 8), (2, 4), (2, 8), (1, 2), (1, 4)]
)
def test_the_teacher_ends_where_the_student_lands(student: int, teacher: int) -> None:
    """A teacher that always sees the same x0 and eps lands exactly on alpha_s x0 + sigma_s eps."""
    t = torch.tensor(trained_times(student))
    x0, eps = torch.randn(2, len(t), 4, 2, 2, dtype=torch.float64)
    calls = []

    def teach(x: torch.Tensor, times: torch.Tensor) -> Prediction:
        calls.append(times)
        return Prediction(x0, eps)

    landed = teacher_landing(teach, SCHEDULE.add_noise(x0, eps, t), t, student, teacher, SCHEDULE)
    alpha, sigma = SCHEDULE.coefficients(landing(t, student), x0)
    assert len(calls) == teacher // student
    assert torch.allclose(landed, alpha * x0 + sigma * eps, atol=1e-12)


def test_only_clean_landings_are_noised() -> None:
    s = torch.tensor([0, 0, 0, 250, 500])
    noised = draw_noised_times(5, (1.0, 1.0, 1.0, 1.0), torch.Generator().manual_seed(0), SCHEDULE)
    assert set(noised.tolist()) <= {10, 250, 500, 750}
    x, eps = torch.randn(2, 5, 4, 2, 2)
    after = noise_landed(x, s, noised, eps, SCHEDULE)
    assert torch.equal(after[3:], x[3:])
    assert torch.equal(after[:3], SCHEDULE.add_noise(x, eps, noised)[:3])


def test_the_early_weight_favours_the_lowest_time() -> None:
    weights = (5.0, 1.0, 1.0, 1.0)
    drawn = draw_noised_times(4000, weights, torch.Generator().manual_seed(0), SCHEDULE)
    assert 0.59 < (drawn == 10).float().mean() < 0.66
