"""The adversarial method: what each setting does, in numbers that are known beforehand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.answering import Answering
from twostep.distill.methods.adversarial import Adversarial, JudgedPair
from twostep.distill.methods.discriminator import Discriminator, LoraDiscriminator
from twostep.distill.pairs import Batches, Transition
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.networks.adapters import Lora, add_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness, TrainingError

from .test_trainer import make_student


def make_stage(method: dict[str, object] | None = None, **changes: object) -> Stage:
    values = {
        "student_steps": 2,
        "teacher_steps": 4,
        "iterations": 8,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_iterations": 1,
        "precision": "fp32",
        "method": {"name": "adversarial", **(method or {})},
    }
    return Stage.model_validate(values | changes)


class Ruler(nn.Module):
    """A discriminator whose logit is the mean of what it sees, plus the prompt's first number."""

    conditional = False

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Sequence[Tensor]:
        prompt = conditioning.pooled[:, :1, None, None]
        return [x.mean(dim=(1, 2, 3), keepdim=True) + prompt]

    def judge(self, before: Sequence[Tensor] | None, after: Sequence[Tensor]) -> Tensor:
        return after[0][:, 0, 0, 0]


REAL = torch.tensor([1.0, 2.0, 3.0, 4.0])
FAKE = torch.tensor([0.5, 2.5, 1.0, 0.0])


def level(values: Tensor) -> Tensor:
    """Latents of which each is one number everywhere."""
    return values[:, None, None, None].expand(-1, 4, 2, 2).clone()


def judged_pair(perturbing: float | None = None) -> JudgedPair:
    prompts = torch.tensor([[0.0], [10.0], [20.0], [30.0]])
    conditioning = Conditioning(torch.zeros(4, 1, 1), prompts, torch.zeros(4, 6))
    x_t, t = torch.zeros(4, 4, 2, 2), torch.full((4,), 1000)
    fake = level(FAKE).requires_grad_()
    student = Transition(x_t=x_t, x_s=fake, t=t, s=torch.full((4,), 500), conditioning=conditioning)
    return JudgedPair(
        taken=student,
        student=student,
        landed=level(2 * FAKE).requires_grad_(),
        real=level(REAL),
        eps=x_t,
        perturbing=None if perturbing is None else torch.full((4, 4, 2, 2), perturbing),
    )


def loss(role: str, method: dict[str, object], perturbing: float | None = None) -> float:
    stage = make_stage(method)
    models = {"discriminator": Ruler()}
    total = Adversarial(stage).loss(role, judged_pair(perturbing), models)["total"]
    return float(total.detach())


def test_the_relativistic_loss_compares_real_and_fake_of_one_item() -> None:
    gap = REAL - FAKE
    assert loss("discriminator", {}) == pytest.approx(float(softplus(-gap).mean()))
    assert loss("student", {}) == pytest.approx(float(softplus(gap).mean()))


def test_the_non_saturating_loss_is_that_of_the_paper() -> None:
    method = {"loss": "non-saturating"}
    prompts = torch.tensor([0.0, 10.0, 20.0, 30.0])
    expected = softplus(-(REAL + prompts)).mean() + softplus(FAKE + prompts).mean()
    assert loss("discriminator", method) == pytest.approx(float(expected))
    assert loss("student", method) == pytest.approx(float(softplus(-(FAKE + prompts)).mean()))


@pytest.mark.parametrize(("weights", "factor"), [((3.0, 0.0), 3.0), ((0.0, 5.0), 5.0)])
def test_the_penalties_are_the_squared_change_under_noise(
    weights: tuple[float, float], factor: float
) -> None:
    r1, r2 = weights
    without = loss("discriminator", {})
    # The ruler is linear: noise of 0.2 everywhere changes each logit by 0.2.
    penalised = loss("discriminator", {"r1_weight": r1, "r2_weight": r2}, perturbing=0.2)
    assert penalised - without == pytest.approx(factor * 0.04, rel=1e-4)


def test_a_prompt_that_does_not_fit_is_a_further_fake() -> None:
    without = loss("discriminator", {})
    with_them = loss("discriminator", {"mismatched_weight": 0.5})
    # Item i under the prompt of item i - 1: 10 less, and the first 30 more.
    told = (3 * softplus(torch.tensor(-10.0)) + softplus(torch.tensor(30.0))) / 4
    assert with_them - without == pytest.approx(0.5 * float(told), rel=1e-4)


def test_the_students_landing_may_be_pulled_to_the_teachers_before_it_is_noised() -> None:
    without = loss("student", {})
    # `taken` of this pair lands on FAKE, the student on twice as much.
    pulled = loss("student", {"regression_weight": 3.0})
    assert pulled - without == pytest.approx(3.0 * float(FAKE.square().mean()), rel=1e-4)
    assert loss("discriminator", {"regression_weight": 3.0}) == loss("discriminator", {})


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_pull_is_that_of_regression(teacher: Bundle, source: object, num_parts: int) -> None:
    gradients = []
    # In two parts the student's landing is computed a second time, in its turn.
    for method in ({"regression_weight": 1e6}, {"name": "regression"}):
        trainer = StageTrainer(make_stage(method), source, teacher.denoiser, make_student(teacher))
        batches = replace(trainer.batches, num_parts=num_parts)
        pair = trainer.method.draw(0, batches, trainer.models, Randomness.at(0, 0))
        trainer.method.loss("student", pair, trainer.models)["total"].backward()
        parameters = trainer.models["student"].network.parameters()
        gradients.append(torch.cat([each.grad.flatten() for each in parameters]))
    by_game, by_regression = gradients
    assert torch.allclose(by_game / 1e6, by_regression, rtol=1e-3, atol=1e-6)
    assert float(by_regression.norm()) > 1e-2


def test_turns_follow_the_warmup_and_the_steps_of_the_discriminator() -> None:
    method = Adversarial(make_stage({"discriminator_warmup": 2, "discriminator_steps": 3}))
    turns = ["student" in method.turns(iteration) for iteration in range(8)]
    assert turns == [False, False, False, False, True, False, False, True]
    assert all(method.turns(iteration)[0] == "discriminator" for iteration in range(8))
    method = Adversarial(make_stage({"student_first": True, "discriminator_steps": 2}))
    assert list(method.turns(0)) == ["discriminator"]
    assert list(method.turns(1)) == ["student", "discriminator"]


@pytest.mark.parametrize("student_first", [True, False])
def test_the_student_can_face_a_discriminator_that_has_not_seen_its_landings(
    teacher: Bundle, source: object, student_first: bool
) -> None:
    stage = make_stage({"student_first": student_first, "discriminator_learning_rate": 1e-3})
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher))
    figures = {
        name: float(value) for name, value in trainer.iterate(0, Randomness.at(0, 0)).items()
    }
    # softplus(gap) - softplus(-gap) = gap, as long as both losses see one discriminator.
    difference = figures["student_loss"] - figures["discriminator_loss"]
    assert (difference == pytest.approx(figures["gap"], abs=1e-5)) == student_first


def test_heads_stand_where_they_are_asked_for(teacher: Bundle) -> None:
    widths = teacher.denoiser.backbone.spec.feature_widths
    every = Discriminator(teacher.denoiser, conditional=True, levels="all")
    one = Discriminator(teacher.denoiser, conditional=False, levels="mid")
    assert [head[0][0].in_channels for head in every.heads] == [2 * width for width in widths]
    assert [head[0][0].in_channels for head in one.heads] == [widths[-1]]
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1000, 500, 10])
    conditioning = teacher.text.conditioning(["a fox"], 64, 64).expand(3)
    features = every.features(x, t, conditioning)
    sizes = [level.shape[-1] for level in features]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    # The logit is the sum of the heads'.
    joined = [torch.cat([level, level], dim=1) for level in features]
    alone = [
        head(level).mean(dim=(1, 2, 3)) for head, level in zip(every.heads, joined, strict=True)
    ]
    torch.testing.assert_close(every.judge(features, features), sum(alone))


@pytest.mark.parametrize(("precision", "differs"), [("fp32", False), ("stage", True)])
def test_it_computes_in_its_own_precision(precision: str, differs: bool, teacher: Bundle) -> None:
    judge = Discriminator(teacher.denoiser, conditional=False, precision=precision)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1000, 500])
    conditioning = teacher.text.conditioning(["a fox"], 64, 64).expand(2)
    exact = judge.judge(None, judge.features(x, t, conditioning))
    with torch.autocast("cpu", torch.bfloat16):
        logits = judge.judge(None, judge.features(x, t, conditioning))
    assert torch.equal(logits, exact) is not differs


def test_heads_may_learn_at_a_rate_of_their_own(teacher: Bundle, source: object) -> None:
    stage = make_stage({"discriminator_learning_rate": 1e-4, "head_learning_rate": 7e-4})
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher))
    groups = trainer.optimisers["discriminator"].param_groups
    assert [group["lr"] for group in groups] == [1e-4, 7e-4]
    discriminator = trainer.models["discriminator"]
    assert len(groups[1]["params"]) == len(list(discriminator.heads.parameters()))
    counted = sum(len(group["params"]) for group in groups)
    assert counted == len(list(discriminator.parameters()))


@pytest.mark.parametrize(
    ("stage", "betas"),
    [
        ({}, (0.0, 0.99)),
        ({"betas": (0.5, 0.9)}, (0.5, 0.9)),
        ({"optimiser": "prodigy", "learning_rate": 1.0}, (0.0, 0.99)),
        # What the paper says of Adam's moments is not meant for these.
        ({"optimiser": "lion"}, (0.9, 0.99)),
        ({"optimiser": "lion", "betas": (0.95, 0.98)}, (0.95, 0.98)),
        ({"optimiser": "adafactor"}, None),
    ],
)
def test_a_stage_s_own_betas_win_over_the_paper_s(
    stage: dict[str, object], betas: tuple[float, float] | None, teacher: Bundle, source: object
) -> None:
    made = make_stage({}, **stage)
    trainer = StageTrainer(made, source, teacher.denoiser, make_student(teacher))
    found = {
        name: optimiser.param_groups[0].get("betas")
        for name, optimiser in trainer.optimisers.items()
    }
    assert found == {"student": betas, "discriminator": betas}


def test_real_may_be_the_data(teacher: Bundle, source: object) -> None:
    stage = make_stage({"real": "data"}, student_steps=1, teacher_steps=None)
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher, "x0"))
    pair = trainer.method.draw(0, trainer.batches, trainer.models, Randomness.at(0, 0))
    x0, _ = trainer.batches.examples(Randomness.at(0, 0))
    assert torch.equal(pair.taken.x_s, x0)
    assert trainer.method.cost().teacher_evaluations == 0


def test_a_student_that_lands_where_data_lie_is_told_from_them_by_nothing(
    teacher: Bundle, source: object
) -> None:
    """Real and fake are noised alike: equal landings are equal where they are judged."""
    stage = make_stage({"real": "data"}, student_steps=1, teacher_steps=None)
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher, "x0"))
    method = trainer.method
    random = Randomness.at(0, 3)
    x0, _ = trainer.batches.examples(Randomness.at(0, 3))

    perfect = Denoiser(Answering(x0), teacher.denoiser.schedule, "x0")
    models = {**trainer.models, "student": perfect}
    pair = method.draw(0, trainer.batches, models, random)
    assert torch.equal(pair.student.x_s, pair.real)
    assert set(pair.student.s.tolist()) <= {10, 250, 500, 750}


def test_matching_trains_a_fake_score_and_each_turn_moves_its_own_role_alone(
    teacher: Bundle, source: object
) -> None:
    stage = make_stage(
        {"matching_weight": 0.5, "fake_score_learning_rate": 1e-3}, teacher="first", guidance=3.0
    )
    trainer = StageTrainer(stage, source, teacher.denoiser, make_student(teacher))
    before = {
        name: {key: value.clone() for key, value in role.weights.state_dict().items()}
        for name, role in trainer.roles.items()
    }
    assert set(before) == {"student", "discriminator", "fake_score"}
    figures = {
        name: float(value) for name, value in trainer.iterate(0, Randomness.at(0, 0)).items()
    }
    assert figures["student_loss"] == pytest.approx(
        figures["adversarial"] + 0.5 * figures["matching"], rel=1e-4
    )
    assert figures["matching"] > 0
    for name, weights in before.items():
        now = trainer.roles[name].weights.state_dict()
        assert any(not torch.equal(now[key], value) for key, value in weights.items()), name
    assert all(parameter.grad is None for parameter in teacher.denoiser.network.parameters())


@pytest.mark.parametrize(
    ("method", "stage", "lesson"),
    [
        ({"matching_weight": 1.0}, {}, 'teacher = "first"'),
        ({"discriminator_warmup": 8}, {}, "leaves the student none of the 8"),
        ({"noised_weights": (1, 1)}, {}, "noised_weights must be 4 numbers"),
        ({"time_weights": (1, 1, 1)}, {}, "time_weights must be 4 numbers"),
        ({"time_weights": (0, 0, 0, 0)}, {}, "not all 0"),
        ({"real": "data", "bank": "somewhere"}, {}, "bank holds the teacher's landings"),
        ({"bank": "somewhere"}, {}, "multiple of 16"),
        ({"bank": "somewhere", "reuse": 2}, {"batch_size": 16}, "leave reuse out"),
        ({"bank": "somewhere", "bank_size": 24}, {"batch_size": 16}, "multiple of batch_size"),
        ({"early_weight": 5}, {}, "It is one of 'lightning'"),
        ({}, {"accumulate": 3}, "does not divide batch_size"),
        ({"head_learning_rate": 0.5}, {"optimiser": "prodigy"}, "prodigy finds one rate"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    method: dict[str, object], stage: dict[str, object], lesson: str
) -> None:
    with pytest.raises(ValueError, match=lesson):
        make_stage(method, **stage)


def test_times_are_drawn_by_their_weights(teacher: Bundle, source: object) -> None:
    stage = make_stage({"time_weights": (3, 1, 0, 0)}, batch_size=400)
    landings = Adversarial(stage).landings
    assert landings is not None
    batches = Batches(source, 400, torch.device("cpu"))
    start = landings._start(batches, teacher.denoiser, Randomness.at(0, 0))
    counts = [int((start.t == time).sum()) for time in (1000, 750, 500, 250)]
    assert counts[2:] == [0, 0]
    # 300 expected; the deviation of 400 draws at 3/4 is 8.7.
    assert counts[0] == pytest.approx(300, abs=4 * math.sqrt(400 * 0.75 * 0.25))


def test_a_checkpoint_of_another_layout_is_refused_by_name(teacher: Bundle) -> None:
    every = Discriminator(teacher.denoiser, conditional=False, levels="all")
    mid = Discriminator(teacher.denoiser, conditional=False, levels="mid")
    with pytest.raises(TrainingError, match=r"it has heads\.1.*levels, objective"):
        mid.load_state_dict(every.state_dict())
    pair = Discriminator(teacher.denoiser, conditional=True, levels="mid")
    with pytest.raises(TrainingError, match=r"heads\.0\.0\.0\.weight is .* instead of"):
        mid.load_state_dict(pair.state_dict())
    add_lora(teacher.denoiser.network, "student", rank=2)
    on_base = LoraDiscriminator(teacher.denoiser, conditional=False, rank=2)
    with pytest.raises(TrainingError, match="a network of its own"):
        on_base.load_state_dict(mid.state_dict())
    assert Lora(teacher.denoiser.network, on_base.NAME).rank == 2
