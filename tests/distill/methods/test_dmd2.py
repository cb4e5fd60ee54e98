"""DMD2 on Gaussians: backward simulation, who learns when, and where student and fake score end."""

from itertools import pairwise

import pytest
import torch

from twostep.diffusion import find_sampler, prediction_from_output
from twostep.diffusion.samplers import renoised_input
from twostep.distill.methods.dmd2 import Dmd2, visited_times
from twostep.distill.pairs import Batches
from twostep.distill.trainer import StageTrainer
from twostep.training.loop import Randomness

from .conftest import SCHEDULE, Affine, Consistent, Draws, gaussian, make_stage, says_x0

MEAN, DEVIATION = 0.7, 0.5
TIMES = (1000, 750, 500, 250)
ALONE = {"name": "dmd2", "gan_weight": 0.0}


def make_trainer(stage, student) -> StageTrainer:
    return StageTrainer(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION), student)


@pytest.mark.parametrize("index", range(4))
def test_backward_simulation_has_the_marginals_of_the_data(
    index: int, generator: torch.Generator
) -> None:
    """A student that maps noise to samples is fed N(alpha m, alpha^2 d^2 + sigma^2) at a time."""
    count = 40_000
    noise = torch.randn(count, 1, generator=generator)

    def denoise(x, t):
        alpha, sigma = SCHEDULE.coefficients(t, x)
        spread = (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
        # From pure noise, which holds nothing of the mean, as from the flow.
        centre = torch.where((t == 1000).view(-1, 1), 0.0, alpha * MEAN)
        spread = torch.where((t == 1000).view(-1, 1), 1.0, spread)
        x0 = MEAN + DEVIATION * (x - centre) / spread
        return prediction_from_output(x0, x, alpha, sigma, "x0")

    calls = []

    def fresh(i: int) -> torch.Tensor:
        calls.append(i)
        return torch.randn(count, 1, generator=generator)

    x = renoised_input(denoise, noise, TIMES, index, SCHEDULE, fresh)
    assert calls == list(range(index))
    alpha, sigma = SCHEDULE.alphas[TIMES[index]].item(), SCHEDULE.sigmas[TIMES[index]].item()
    mean, variance = (
        (0.0, 1.0) if index == 0 else (alpha * MEAN, alpha**2 * DEVIATION**2 + sigma**2)
    )
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.var().item() == pytest.approx(variance, rel=0.03)


def test_it_is_what_the_sampler_feeds_the_network(generator: torch.Generator) -> None:
    noise = torch.randn(3, 2, generator=generator)
    fresh = torch.randn(4, 3, 2, generator=generator)
    fed = []

    def denoise(x, t):
        fed.append(x)
        alpha, sigma = SCHEDULE.coefficients(t, x)
        return prediction_from_output(torch.tanh(x), x, alpha, sigma, "x0")

    columns = torch.tensor([*TIMES, 0])[:, None].expand(-1, 3)
    find_sampler("renoise")(denoise, noise, columns, SCHEDULE, lambda i: fresh[i])
    sampled = list(fed)
    for index in range(4):
        x = renoised_input(denoise, noise, TIMES, index, SCHEDULE, lambda i: fresh[i])
        assert torch.equal(x, sampled[index])


def test_the_student_steps_in_every_fifth_iteration() -> None:
    method = Dmd2(make_stage(ALONE))
    turns = [method.turns(i) for i in range(6)]
    assert turns == [("fake", "student"), *[("fake",)] * 4, ("fake", "student")]
    student = says_x0(Affine(0.0, 1.0))
    trainer = make_trainer(make_stage(ALONE), student)
    weights = [student.network.mean.item()]
    for i in range(6):
        trainer.iterate(i, Randomness.at(0, i))
        weights.append(student.network.mean.item())
    moved = [after != before for before, after in pairwise(weights)]
    assert moved == [True, False, False, False, False, True]


def test_only_the_students_iterations_keep_its_graph() -> None:
    stage = make_stage(ALONE)
    batches = Batches(Draws(MEAN, DEVIATION), 4, torch.device("cpu"))
    models = {"student": says_x0(Affine(0.0, 1.0)), "teacher": gaussian(MEAN, DEVIATION)}
    drawn = [Dmd2(stage).draw(i, batches, models, Randomness.at(0, i)) for i in range(2)]
    assert [pair.x.requires_grad for pair in drawn] == [True, False]


@pytest.mark.slow
def test_student_and_fake_score_reach_the_teachers_distribution() -> None:
    """The whole loop, with a fake score that has to learn where the student is."""
    stage = make_stage(
        {**ALONE, "fake_learning_rate": 0.05},
        student_steps=1,
        iterations=1500,
        batch_size=256,
        learning_rate=0.02,
        decay_share=0.5,
    )
    student = says_x0(Affine(-0.5, 1.0))
    trainer = make_trainer(stage, student)
    for i in range(stage.iterations):
        trainer.iterate(i, Randomness.at(0, i))
    assert student.network.mean.item() == pytest.approx(MEAN, abs=0.06)
    assert abs(student.network.deviation.item()) == pytest.approx(DEVIATION, abs=0.06)
    fake = trainer.models["fake"].weights.network
    assert fake.mean.item() == pytest.approx(MEAN, abs=0.1)
    assert abs(fake.deviation.item()) == pytest.approx(DEVIATION, abs=0.1)


def test_one_step_is_conditioned_at_two_fifths_and_first_learns_by_regression() -> None:
    assert visited_times(1, SCHEDULE) == (400,)
    assert visited_times(4, SCHEDULE) == TIMES
    method = {**ALONE, "regression_iterations": 3}
    stage = make_stage(method, student_steps=1, teacher_steps=8, iterations=10)
    assert [Dmd2(stage).turns(i) for i in (0, 1, 2, 3, 4, 5)] == [
        *[("fake", "student")] * 3,
        ("fake",),
        ("fake",),
        ("fake", "student"),
    ]
    # Three landings of eight steps, and the two answers of the iterations 5 and 10 after that.
    assert Dmd2(stage).cost().teacher_evaluations == pytest.approx((3 * 8 + 7 / 5) / 10)
    changes = Dmd2(stage).describe(gaussian(MEAN, DEVIATION))
    assert (changes.sampling_times, changes.trained_times) == ((400,), (400,))
    assert changes.sampler == "renoise"
    batches = Batches(Draws(MEAN, DEVIATION), 4, torch.device("cpu"))
    models = make_trainer(stage, says_x0(Consistent(0.0, 1.0))).models
    pair = Dmd2(stage).draw(0, batches, models, Randomness.at(0, 0))
    loss = Dmd2(stage).loss("student", pair, models)["total"]
    assert loss.item() == pytest.approx((pair.x - pair.landing).square().mean().item())
    assert Dmd2(stage).draw(3, batches, models, Randomness.at(0, 3)).landing is None


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="leave teacher_steps out"):
        make_stage(ALONE, teacher_steps=8)
    with pytest.raises(ValueError, match="for students of one step"):
        make_stage({**ALONE, "regression_iterations": 2}, teacher_steps=8)
    with pytest.raises(ValueError, match="need teacher_steps"):
        make_stage({**ALONE, "regression_iterations": 2}, student_steps=1)
