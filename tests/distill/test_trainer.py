"""The trainer: methods learn, gradients stay where they belong, and resuming changes nothing."""

import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer, train_stage
from twostep.models.bundle import Bundle
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.figures import Figures
from twostep.training.loop import Randomness, TrainingError
from twostep.training.run_folder import RunFolder

REGRESSION = {"name": "regression"}
CONVERSION = {"name": "conversion"}
CONDITIONAL = {"name": "adversarial", "objective": "conditional"}
UNCONDITIONAL = {"name": "adversarial", "objective": "unconditional"}


def make_stage(**changes: object) -> Stage:
    values = {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": CONDITIONAL,
        "iterations": 4,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_iterations": 1,
        "precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
        "ema_decay": 0.5,
    }
    return Stage.model_validate(values | changes)


def make_student(teacher: Bundle, prediction_type: str = "eps") -> Denoiser:
    """A copy of the teacher that can be trained."""
    network = copy.deepcopy(teacher.denoiser.network).requires_grad_(True)
    return replace(teacher.denoiser.with_network(network), prediction_type=prediction_type)


def has_gradients(network: torch.nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in network.parameters())


def make_trainer(stage: Stage, teacher: Bundle, source: object) -> StageTrainer:
    prediction_type = stage.make_method().describe(teacher.denoiser).prediction_type
    return StageTrainer(stage, source, teacher.denoiser, make_student(teacher, prediction_type))


def numbers(figures: Figures) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "teacher_steps"),
    [(REGRESSION, 2), (CONVERSION, None)],
    ids=["regression", "conversion"],
)
def test_regression_lowers_its_loss(
    method: dict[str, object], teacher_steps: int | None, teacher: Bundle, source: object
) -> None:
    stage = make_stage(
        method=method, student_steps=1, teacher_steps=teacher_steps, learning_rate=1e-3
    )
    trainer = make_trainer(stage, teacher, source)
    losses = [trainer.iterate(i, Randomness.at(0, 0))["student_loss"] for i in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def final_gaps(teacher: Bundle, source: object, method: dict[str, object]) -> list[float]:
    """The discriminator's gap over 24 iterations against a student that stands still."""
    stage = make_stage(method={**method, "discriminator_learning_rate": 1e-3}, learning_rate=1e-12)
    student = make_student(teacher)
    with torch.no_grad():
        student.network.conv_out.bias += 0.5
    trainer = StageTrainer(stage, source, teacher.denoiser, student)
    return [trainer.iterate(i, Randomness.at(0, 0))["gap"] for i in range(24)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [CONDITIONAL, UNCONDITIONAL],
    ids=lambda method: method["objective"],
)
def test_the_discriminator_learns_to_tell_a_student_that_stands_still(
    method: dict[str, object], teacher: Bundle, source: object
) -> None:
    gaps = final_gaps(teacher, source, method)
    assert gaps[-1] > gaps[0] + 0.5


@pytest.mark.slow
def test_the_penalty_keeps_the_discriminator_flat(teacher: Bundle, source: object) -> None:
    flat = final_gaps(teacher, source, {**CONDITIONAL, "r1_weight": 1e6})
    free = final_gaps(teacher, source, CONDITIONAL)
    assert flat[-1] < 0.5 * free[-1]


def test_gradients_reach_neither_teacher_nor_foreign_networks(
    teacher: Bundle, source: object
) -> None:
    before = weights(teacher.denoiser.network)
    trainer = make_trainer(make_stage(), teacher, source)
    student = trainer.models["student"].network
    discriminator = trainer.models["discriminator"]
    start = weights(student)
    fresh = weights(discriminator)
    held: list[list[str]] = []

    def note_gradients(*_: object) -> None:
        networks = {"student": student, "discriminator": discriminator}
        held.append([name for name, network in networks.items() if has_gradients(network)])

    for optimiser in trainer.optimisers.values():
        optimiser.register_step_pre_hook(note_gradients)
    trainer.iterate(0, Randomness.at(0, 0))
    # What `twostep plan` counts on: one process has gradients of one network at a time.
    assert held == [["discriminator"], ["student"]]
    assert not has_gradients(student)
    assert not has_gradients(discriminator)
    assert all(
        torch.equal(value, before[key])
        for key, value in teacher.denoiser.network.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in teacher.denoiser.network.parameters())
    assert any(not torch.equal(value, start[key]) for key, value in student.state_dict().items())
    changed = [
        key
        for key, value in discriminator.state_dict().items()
        if not torch.equal(value, fresh[key])
    ]
    assert any(key.startswith("encoder.conv_in") for key in changed)
    assert any(key.startswith("encoder.mid_block") for key in changed)
    assert any(key.startswith("head") for key in changed)


def test_all_learn_again_after_a_loss_that_could_not_be_computed(
    teacher: Bundle, source: object
) -> None:
    trainer = make_trainer(make_stage(), teacher, source)
    loss = trainer.method.loss

    def failing(role: str, pair: object, models: object) -> dict[str, torch.Tensor]:
        if role == "student":
            raise MemoryError
        return dict(loss(role, pair, models))

    trainer.method.loss = failing
    with pytest.raises(MemoryError):
        trainer.iterate(0, Randomness.at(0, 0))
    discriminator = trainer.models["discriminator"]
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_the_discriminator_starts_as_the_teachers_encoder_and_has_no_decoder(
    teacher: Bundle,
) -> None:
    judge = Discriminator(teacher.denoiser, conditional=True)
    names = dict(judge.encoder.named_parameters())
    own = dict(teacher.denoiser.network.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in names.items())
    assert not any(key.startswith(("up_blocks", "conv_out")) for key in names)


def test_batches_that_are_used_again_are_drawn_and_taught_once(
    teacher: Bundle, source: object
) -> None:
    stage = make_stage(method={**REGRESSION, "reuse": 3}, iterations=6)

    def steps(trainer: StageTrainer, iterations: range) -> list[object]:
        return [
            trainer.method.landings.draw(
                i, trainer.batches, teacher.denoiser, Randomness.at(0, i, stage.name)
            )
            for i in iterations
        ]

    taken = steps(make_trainer(stage, teacher, source), range(6))
    assert taken[0] is taken[2] is taken[4]
    assert taken[1] is taken[3] is taken[5]
    assert not torch.equal(taken[0].x_s, taken[1].x_s)
    (late,) = steps(make_trainer(stage, teacher, source), range(5, 6))
    assert torch.equal(late.x_s, taken[5].x_s)


def test_a_discriminator_of_its_own_computes_blocks_anew_and_the_same(
    teacher: Bundle, source: object
) -> None:
    figures, calls = [], []
    for checkpointing in (False, True):
        stage = make_stage(gradient_checkpointing=checkpointing)
        trainer = make_trainer(stage, teacher, source)
        calls.append(Mock(return_value=None))
        encoder = trainer.models["discriminator"].encoder
        encoder.down_blocks[0].resnets[0].register_forward_pre_hook(calls[-1])
        figures.append([numbers(trainer.iterate(i, Randomness.at(0, i))) for i in range(2)])
    # Of the three looks of an iteration, that at x_t alone has no backward pass.
    assert [call.call_count for call in calls] == [6, 10]
    assert figures[1] == [pytest.approx(before, rel=1e-4) for before in figures[0]]


@pytest.mark.slow
def test_moments_in_8_bits_take_a_quarter_and_learn_as_well(
    teacher: Bundle, source: object
) -> None:
    def learn(optimiser: str) -> tuple[float, float]:
        stage = make_stage(
            method=REGRESSION,
            student_steps=1,
            teacher_steps=2,
            learning_rate=1e-3,
            optimiser=optimiser,
        )
        trainer = make_trainer(stage, teacher, source)
        losses = [trainer.iterate(i, Randomness.at(0, 0))["student_loss"] for i in range(30)]
        state = trainer.optimisers["student"].state.values()
        return losses[-1] / losses[0], sum(
            value.numel() * value.element_size()
            for kept in state
            for value in kept.values()
            if torch.is_tensor(value)
        )

    (whole, of_32), (eighth, of_8) = learn("adamw"), learn("adamw8bit")
    assert of_8 < 0.3 * of_32
    assert whole < 0.9
    assert eighth < whole + 0.05


@pytest.mark.parametrize(
    ("method", "optimiser"),
    [
        (REGRESSION, "adamw"),
        pytest.param({**REGRESSION, "reuse": 2}, "adamw", marks=pytest.mark.slow),
        (CONDITIONAL, "adamw"),
        pytest.param(UNCONDITIONAL, "adamw", marks=pytest.mark.slow),
        pytest.param(UNCONDITIONAL, "adamw8bit", marks=pytest.mark.slow),
        pytest.param(CONDITIONAL, "adafactor", marks=pytest.mark.slow),
        pytest.param(CONDITIONAL, "prodigy", marks=pytest.mark.slow),
        pytest.param(CONDITIONAL, "lion", marks=pytest.mark.slow),
    ],
    ids=[
        *("regression", "reuse", "conditional", "unconditional"),
        *("8-bit", "adafactor", "prodigy", "lion"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    method: dict[str, object], optimiser: str, teacher: Bundle, source: object, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    shape = {"student_steps": 2, "teacher_steps": 4, "decay_share": 0.5}
    rate = 1.0 if optimiser == "prodigy" else 1e-4
    stage = make_stage(method=method, optimiser=optimiser, learning_rate=rate, **shape)
    whole = make_student(teacher)
    train_stage(stage, source, teacher.denoiser, whole, RunFolder(tmp_path / "whole", stage))
    with pytest.raises(Killed):
        train_stage(
            stage,
            source,
            teacher.denoiser,
            make_student(teacher),
            RunFolder(tmp_path / "cut", stage),
            on_iteration=die,
        )
    resumed = make_student(teacher)
    train_stage(stage, source, teacher.denoiser, resumed, RunFolder(tmp_path / "cut", stage))
    expected = whole.network.state_dict()
    assert all(
        torch.equal(value, expected[key]) for key, value in resumed.network.state_dict().items()
    )


def test_nan_stops_the_run_and_leaves_the_last_checkpoint(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    class Poisoned:
        def draw(
            self, count: int, tensors: torch.Generator, words: object
        ) -> tuple[torch.Tensor, Conditioning]:
            latents, conditioning = source.draw(count, tensors, words)
            self.calls = getattr(self, "calls", 0) + 1
            return latents * (float("nan") if self.calls > 3 else 1), conditioning

        def empty(self, like: Conditioning) -> Conditioning:
            return source.empty(like)

    stage = make_stage()
    folder = RunFolder(tmp_path / "run", stage)
    with pytest.raises(
        TrainingError, match=r"discriminator loss is nan at iteration 3.*learning_rate"
    ):
        train_stage(stage, Poisoned(), teacher.denoiser, make_student(teacher), folder)
    kept = folder.load(stage.name)
    assert kept is not None
    assert kept["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in kept["average"]["weights"].values())
