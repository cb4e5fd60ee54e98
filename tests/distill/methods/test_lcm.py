"""Consistency distillation on Gaussians, where the flow's map to its end is known."""

import pytest
import torch

from twostep.diffusion import VariancePreserving, landing
from twostep.distill.methods.lcm import Lcm, consistent_x0, visited_times
from twostep.distill.pairs import Batches, Transition
from twostep.distill.trainer import StageTrainer
from twostep.networks.conditioning import Conditioning
from twostep.training.loop import Randomness

from .conftest import (
    SCHEDULE,
    Consistent,
    Draws,
    gaussian,
    make_stage,
    nothing,
    says_x0,
)

MEAN, DEVIATION = 0.7, 0.5


class Prompted(Draws):
    """Data whose prompts shift the mean that the teacher sees by 1."""

    def draw(self, count, tensors, words) -> tuple[torch.Tensor, Conditioning]:
        x0, _ = super().draw(count, tensors, words)
        return x0, nothing(count, shift=1.0)


def draw(stage, source, teacher, iteration: int = 0) -> Transition:
    batches = Batches(source, stage.batch_size, torch.device("cpu"))
    models = {"teacher": teacher}
    return Lcm(stage).draw(iteration, batches, models, Randomness.at(0, iteration))


def test_a_pair_is_one_ddim_step_of_the_teacher() -> None:
    """x_s = alpha_s x0 + sigma_s eps with the closed-form x0 and eps of Gaussian data."""
    stage = make_stage({"name": "lcm"}, batch_size=64)
    pair = draw(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION))
    assert torch.equal(pair.s, pair.t - 20)
    assert {*pair.t.tolist()} <= {*range(20, 1001, 20)}
    alpha, sigma = SCHEDULE.coefficients(pair.t, pair.x_t)
    slope = (pair.x_t - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    alpha_s, sigma_s = SCHEDULE.coefficients(pair.s, pair.x_t)
    expected = alpha_s * (MEAN + alpha * DEVIATION**2 * slope) + sigma_s * sigma * slope
    torch.testing.assert_close(pair.x_s, expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_folded_into_the_step_with_a_scale_for_every_item() -> None:
    """The teacher is linear in its shift, so each item's scale can be read off its step."""
    stage = make_stage({"name": "lcm", "least_guidance": 3.0}, batch_size=512, guidance=9.0)
    teacher = gaussian(MEAN, DEVIATION)
    pair = draw(stage, Prompted(MEAN, DEVIATION), teacher)

    def landed(shift: float) -> torch.Tensor:
        prediction = teacher(pair.x_t, pair.t, nothing(512, shift))
        alpha_s, sigma_s = SCHEDULE.coefficients(pair.s, pair.x_t)
        return alpha_s * prediction.x0 + sigma_s * prediction.eps

    without, with_prompt = landed(0.0), landed(1.0)
    scales = ((pair.x_s - without) / (with_prompt - without))[pair.t > 100]
    # One scale for all values of an item, drawn between the two.
    assert scales.std(dim=1).max() < 0.05
    assert 3.0 <= scales.mean(dim=1).min() < 3.3
    assert 8.7 < scales.mean(dim=1).max() <= 9.01
    assert scales.mean().item() == pytest.approx(6.0, abs=0.25)


def test_at_time_0_the_answer_is_the_point_itself() -> None:
    model = says_x0(Consistent(MEAN, DEVIATION))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 0])
    said = consistent_x0(model, x, t, nothing(3))
    assert torch.equal(said[[0, 2]], x[[0, 2]])
    expected = model(x[1:2], t[1:2], nothing(1)).x0
    torch.testing.assert_close(said[1:2], expected.detach())


@pytest.mark.parametrize("distance", ["huber", "squared"])
def test_the_flows_own_map_is_the_fixed_point(distance: str) -> None:
    """What is left there is the teacher's error of one step, which falls with the solver's."""

    def loss(mean: float, deviation: float, solver_steps: int = 200) -> float:
        method = {"name": "lcm", "distance": distance, "solver_steps": solver_steps}
        stage = make_stage(method, batch_size=512)
        pair = draw(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION))
        student = says_x0(Consistent(mean, deviation))
        return Lcm(stage).loss("student", pair, {"student": student})["total"].item()

    exact = loss(MEAN, DEVIATION)
    assert exact < 0.2 * loss(MEAN, DEVIATION, solver_steps=50)
    assert exact < 0.1 * loss(MEAN + 0.3, DEVIATION)
    assert exact < 0.1 * loss(MEAN, DEVIATION + 0.3)


def test_the_pseudo_huber_distance_is_the_papers() -> None:
    stage = make_stage({"name": "lcm", "huber_width": 0.03})
    x = torch.zeros(2, 4)
    t = torch.tensor([20, 20])
    pair = Transition(x, torch.full_like(x, 0.04), t, t - 20, nothing(2))

    class Zero(Consistent):
        def forward(self, x, time, conditioning):
            return 0 * x

    found = Lcm(stage).loss("student", pair, {"student": says_x0(Zero(0.0, 1.0))})["total"]
    # sqrt(0.04^2 + 0.03^2) - 0.03
    assert found.item() == pytest.approx(0.02, rel=1e-4)


def test_a_student_learns_the_flows_map() -> None:
    """As far as 20 steps of the solver know it: their DDIM steps end at a deviation of 0.46."""
    stage = make_stage(
        {"name": "lcm", "distance": "squared", "solver_steps": 20, "target_decay": 0.5},
        iterations=120,
        batch_size=256,
        learning_rate=0.05,
        decay_share=0.5,
    )
    student = says_x0(Consistent(-0.2, 1.0))
    trainer = StageTrainer(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION), student)
    for i in range(stage.iterations):
        trainer.iterate(i, Randomness.at(0, i))
    assert student.network.mean.item() == pytest.approx(MEAN, abs=0.03)
    assert student.network.deviation.item() == pytest.approx(DEVIATION, abs=0.06)


def test_the_target_follows_a_whole_student_and_is_a_lora_itself() -> None:
    stage = make_stage({"name": "lcm", "target_decay": 0.75})
    student = says_x0(Consistent(0.0, 1.0))
    trainer = StageTrainer(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION), student)
    before = student.network.mean.item()
    trainer.iterate(0, Randomness.at(0, 0))
    moved = student.network.mean.item() - before
    assert moved != 0
    target = trainer.models["target"].network.mean.item()
    assert target == pytest.approx(before + 0.25 * moved, rel=1e-4)
    assert Lcm(make_stage({"name": "lcm"})).target_decay == 0.95
    assert Lcm(make_stage({"name": "lcm"}, lora_rank=4)).target_decay == 0
    own = Lcm(make_stage({"name": "lcm"}, lora_rank=4))
    assert set(own.roles(gaussian(MEAN, DEVIATION), student)) == {"student"}


def test_no_gradient_reaches_the_student_through_its_own_target() -> None:
    """d/dx |f(x_t) - stop(f(x_s))|^2, and not that of the difference of both."""
    stage = make_stage({"name": "lcm", "distance": "squared", "target_decay": 0.0})
    pair = draw(stage, Draws(MEAN, DEVIATION), gaussian(MEAN, DEVIATION))
    student = says_x0(Consistent(0.0, 1.0))
    loss = Lcm(stage).loss("student", pair, {"student": student})["total"]
    (gradient,) = torch.autograd.grad(loss, [student.network.mean])
    said = student(pair.x_t, pair.t, pair.conditioning).x0
    target = consistent_x0(student, pair.x_s, pair.s, pair.conditioning)
    expected = torch.autograd.grad((said - target).square().mean(), [student.network.mean])[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("steps", "indices"),
    [
        (1, (999,)),
        (2, (999, 499)),
        (4, (999, 759, 499, 259)),
        (8, (999, 879, 759, 639, 499, 379, 259, 139)),
    ],
)
def test_the_times_are_those_of_diffusers(steps: int, indices: tuple[int, ...]) -> None:
    from diffusers import LCMScheduler

    scheduler = LCMScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    assert tuple(scheduler.timesteps.tolist()) == indices
    assert visited_times(steps, 50, SCHEDULE) == tuple(i + 1 for i in indices)


def test_the_student_declares_its_times() -> None:
    last = gaussian(MEAN, DEVIATION)
    four, two = (
        Lcm(make_stage({"name": "lcm"}, student_steps=steps)).describe(last) for steps in (4, 2)
    )
    assert (four.sampler, four.sampling_times) == ("renoise", (1000, 760, 500, 260))
    assert (two.sampler, two.sampling_times) == ("renoise", ())
    assert four.trained_times == tuple(range(1000, 0, -20))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"least_guidance 5 is above the stage's guidance 3"):
        make_stage({"name": "lcm", "least_guidance": 5.0}, guidance=3.0)
    with pytest.raises(ValueError, match="leave teacher_steps out"):
        make_stage({"name": "lcm"}, teacher_steps=8)
    with pytest.raises(ValueError, match="at least as many solver_steps"):
        make_stage({"name": "lcm", "solver_steps": 2})


def test_the_lowest_step_lands_on_clean_latents() -> None:
    schedule = VariancePreserving.scaled_linear()
    assert landing(torch.tensor([20]), 50, schedule).item() == 0
