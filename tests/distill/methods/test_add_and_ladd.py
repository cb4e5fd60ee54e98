"""ADD and LADD: the teacher's pull in closed form, which times are drawn, and what is refused."""

from dataclasses import replace

import pytest
import torch

from twostep.distill.methods.add import Add, Answer, score_distillation_loss
from twostep.distill.methods.ladd import Ladd, start_weights
from twostep.distill.pairs import Batches
from twostep.distill.times import draw_weighted_times
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.training.loop import Randomness

from ..conftest import Handful
from .conftest import SCHEDULE, gaussian, make_stage, nothing

MEAN, DEVIATION = 0.7, 0.5


def test_the_teachers_pull_is_the_weighted_distance_to_what_it_sees(
    generator: torch.Generator,
) -> None:
    fake = torch.randn(3, 4, generator=generator).requires_grad_(True)
    eps = torch.randn(3, 4, generator=generator)
    t = torch.tensor([50, 400, 900])
    pair = Answer(
        x0=fake,
        fake=fake,
        t=t,
        eps=eps,
        conditioning=nothing(3, shift=1.0),
        empty=nothing(3),
        codec=None,
    )
    loss = score_distillation_loss(pair, teacher=gaussian(MEAN, DEVIATION), guidance=3.0)
    alpha, sigma = SCHEDULE.coefficients(t, fake)
    x_t = alpha * fake + sigma * eps

    def seen(mean: float) -> torch.Tensor:
        slope = (x_t - alpha * mean) / (alpha**2 * DEVIATION**2 + sigma**2)
        return mean + alpha * DEVIATION**2 * slope

    guided = seen(MEAN) + 3 * (seen(MEAN + 1) - seen(MEAN))
    expected = (alpha * (fake - guided).square()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, fake)
    # Nothing through the teacher: 2 alpha (fake - seen) / n.
    expected_gradient = 2 * alpha * (fake - guided) / fake.numel()
    torch.testing.assert_close(gradient, expected_gradient.detach(), rtol=1e-3, atol=1e-4)


def test_starts_are_drawn_as_the_paper_says() -> None:
    assert start_weights(4, low_noise=True) == (0, 0, 0.5, 0.5)
    assert start_weights(4, low_noise=False) == pytest.approx((0.7, 0.1, 0.1, 0.1))
    assert start_weights(2, low_noise=True) == (0, 1)
    assert start_weights(1, low_noise=True) == (1,)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_weighted_times((1000, 750, 500, 250), (0.7, 0.1, 0.1, 0.1), 10_000, generator)
    assert (drawn == 1000).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert sorted(set(drawn.tolist())) == [250, 500, 750, 1000]


def trainer(bundle: Bundle, method: dict[str, object], **changes: object) -> StageTrainer:
    stage = make_stage(method, **{"learning_rate": 1e-4, "batch_size": 2, **changes})
    student = replace(bundle.denoiser.standalone())
    student.network.requires_grad_(True)
    source = Handful(bundle.text)
    return StageTrainer(stage, source, bundle.denoiser, student, codec=bundle.codec)


@pytest.mark.parametrize(
    "method", [{"name": "add"}, {"name": "ladd", "low_noise_iterations": 0}], ids=["add", "ladd"]
)
def test_heads_learn_first_and_alone_then_the_student_and_never_the_teacher(
    method: dict[str, object], bundle: Bundle
) -> None:
    training = trainer(bundle, method, guidance=2.0)
    teacher = {key: value.clone() for key, value in bundle.denoiser.network.state_dict().items()}
    student = training.models["student"].network
    heads = training.models["heads"]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    heads_before = {key: value.clone() for key, value in heads.state_dict().items()}
    figures = training.iterate(0, Randomness.at(0, 0))
    assert {"heads_loss", "student_loss", "accuracy", "r1"} <= set(figures)
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert any(
        not torch.equal(value, heads_before[key]) for key, value in heads.state_dict().items()
    )
    now = bundle.denoiser.network.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in teacher.items())


def test_real_and_fake_latents_are_noised_alike(bundle: Bundle) -> None:
    """A student that says the data itself cannot be told apart: both are then one tensor."""
    stage = make_stage({"name": "ladd"}, batch_size=4)
    batches = Batches(Handful(bundle.text), 4, torch.device("cpu"))

    class Knows:
        schedule = SCHEDULE

        def __call__(self, x_t, t, conditioning):
            x0, _ = batches.examples(Randomness.at(0, 0))
            return replace(bundle.denoiser(x_t, t, conditioning), x0=x0)

    models = {"student": Knows(), "teacher": bundle.denoiser}
    with torch.no_grad():
        pair = Ladd(stage).draw(0, batches, models, Randomness.at(0, 0))
    torch.testing.assert_close(pair.real, pair.fake)


def test_the_teacher_draws_what_is_real_if_it_is_asked_to(bundle: Bundle) -> None:
    method = {"name": "ladd", "real": "teacher"}
    stage = make_stage(method, batch_size=2, teacher_steps=4, guidance=3.0)
    assert Ladd(stage).cost().teacher_evaluations == 8
    batches = Batches(Handful(bundle.text), 2, torch.device("cpu"))
    models = {"student": bundle.denoiser, "teacher": bundle.denoiser}
    with torch.no_grad():
        pairs = [
            Ladd(one).draw(0, batches, models, Randomness.at(0, 0))
            for one in (stage, make_stage({"name": "ladd"}, batch_size=2))
        ]
    assert not torch.allclose(pairs[0].real, pairs[1].real)
    with pytest.raises(ValueError, match="needs teacher_steps"):
        make_stage(method)
    for name in ("add", "ladd"):
        with pytest.raises(ValueError, match="leave teacher_steps out"):
            make_stage({"name": name}, teacher_steps=8)


def test_the_students_declare_the_trailing_grid_and_fresh_noise() -> None:
    for method, name in ((Add, "add"), (Ladd, "ladd")):
        changes = method(make_stage({"name": name})).describe(gaussian(MEAN, DEVIATION))
        assert changes.sampler == "renoise"
        assert changes.sampling_times == ()
        assert changes.trained_times == (1000, 750, 500, 250)
        assert changes.prediction_type == "eps"


@pytest.mark.parametrize(
    "method", [{"name": "add"}, {"name": "ladd", "low_noise_iterations": 0}], ids=["add", "ladd"]
)
def test_the_student_waits_for_the_heads_as_long_as_they_warm_up(
    method: dict[str, object], bundle: Bundle
) -> None:
    training = trainer(bundle, {**method, "heads_warmup": 1}, iterations=2)
    student = training.models["student"].network
    heads = training.models["heads"]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    heads_before = {key: value.clone() for key, value in heads.state_dict().items()}
    figures = training.iterate(0, Randomness.at(0, 0))
    assert "student_loss" not in figures
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert any(
        not torch.equal(value, heads_before[key]) for key, value in heads.state_dict().items()
    )
    assert "student_loss" in training.iterate(1, Randomness.at(0, 1))
    assert any(not torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize("kind", [Add, Ladd])
def test_a_warmup_of_the_whole_stage_is_refused(kind: type) -> None:
    stage = make_stage({"name": kind.name, "heads_warmup": 5}, iterations=6)
    assert kind(stage).turns(4) == ("heads",)
    assert kind(stage).turns(5) == ("heads", "student")
    with pytest.raises(ValueError, match="heads_warmup 5 leaves the student none of the 5"):
        kind(make_stage({"name": kind.name, "heads_warmup": 5}, iterations=5))
