"""The trainer: objectives are learned, gradients stay where they belong, and resuming changes
nothing.
"""

import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.recipe import Phase
from twostep.distill.trainer import AdversarialTrainer, Lesson, RegressionTrainer, train_phase
from twostep.models.bundle import Bundle
from twostep.networks.conditioning import Conditioning
from twostep.training.loop import Randomness, TrainingError
from twostep.training.run_folder import RunFolder


def phase(**changes: object) -> Phase:
    values = {
        "student_steps": 4,
        "teacher_steps": 8,
        "objective": "conditional",
        "iterations": 4,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "warmup_iterations": 1,
        "precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
        "ema_decay": 0.5,
    }
    return Phase.model_validate(values | changes)


def lesson(teacher: Bundle, source: object, prediction_type: str = "eps") -> Lesson:
    student = copy.deepcopy(teacher.denoiser.network).requires_grad_(True)
    return Lesson(
        source,
        teacher.denoiser,
        replace(teacher.denoiser.with_network(student), prediction_type=prediction_type),
    )


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.mark.parametrize("objective", ["mse", "convert"])
def test_regression_lowers_its_loss(objective: str, teacher: Bundle, source: object) -> None:
    settings = phase(objective=objective, student_steps=1, teacher_steps=2, learning_rate=1e-3)
    trainer = RegressionTrainer(settings, lesson(teacher, source, "x0"))
    losses = [trainer.iterate(i, Randomness.at(0, 0))["loss"] for i in range(60)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("objective", ["conditional", "unconditional"])
def test_the_discriminator_learns_to_tell_a_student_that_stands_still(
    objective: str, teacher: Bundle, source: object
) -> None:
    settings = phase(objective=objective, learning_rate=1e-12, discriminator_learning_rate=1e-3)
    pupil = lesson(teacher, source)
    with torch.no_grad():
        pupil.student.network.conv_out.bias += 0.5
    trainer = AdversarialTrainer(settings, pupil)
    gaps = [trainer.iterate(i, Randomness.at(0, 0))["gap"] for i in range(40)]
    assert gaps[-1] > gaps[0] + 0.5


def test_the_penalty_keeps_the_discriminator_flat(teacher: Bundle, source: object) -> None:
    def gap(weight: float) -> float:
        pupil = lesson(teacher, source)
        with torch.no_grad():
            pupil.student.network.conv_out.bias += 0.5
        trainer = AdversarialTrainer(
            phase(learning_rate=1e-12, discriminator_learning_rate=1e-3, r1_weight=weight), pupil
        )
        return [trainer.iterate(i, Randomness.at(0, 0))["gap"] for i in range(40)][-1]

    assert gap(1e6) < 0.5 * gap(0.0)


def test_gradients_reach_neither_teacher_nor_foreign_networks(
    teacher: Bundle, source: object
) -> None:
    pupil = lesson(teacher, source)
    before = weights(teacher.denoiser.network)
    trainer = AdversarialTrainer(phase(), pupil)
    start, judge = weights(pupil.student.network), weights(trainer.discriminator)
    trainer.iterate(0, Randomness.at(0, 0))
    assert all(
        torch.equal(value, before[key])
        for key, value in teacher.denoiser.network.state_dict().items()
    )
    assert all(parameter.grad is None for parameter in teacher.denoiser.network.parameters())
    assert any(
        not torch.equal(value, start[key])
        for key, value in pupil.student.network.state_dict().items()
    )
    changed = [
        key
        for key, value in trainer.discriminator.state_dict().items()
        if not torch.equal(value, judge[key])
    ]
    assert any(key.startswith("encoder.conv_in") for key in changed)
    assert any(key.startswith("encoder.mid_block") for key in changed)
    assert any(key.startswith("head") for key in changed)


def test_the_discriminator_starts_as_the_teachers_encoder_and_has_no_decoder(
    teacher: Bundle,
) -> None:
    judge = Discriminator(teacher.denoiser, pairs=True)
    names = dict(judge.encoder.named_parameters())
    own = dict(teacher.denoiser.network.named_parameters())
    assert all(torch.equal(value, own[key]) for key, value in names.items())
    assert not any(key.startswith(("up_blocks", "conv_out")) for key in names)


def test_batches_that_are_used_again_are_drawn_and_taught_once(
    teacher: Bundle, source: object
) -> None:
    trainer = RegressionTrainer(
        phase(objective="mse", iterations=6, reuse=3), lesson(teacher, source)
    )
    taught = [trainer._taught(i, Randomness.at(0, i)) for i in range(6)]
    assert taught[0] is taught[2] is taught[4]
    assert taught[1] is taught[3] is taught[5]
    assert not torch.equal(taught[0][1], taught[1][1])
    late = RegressionTrainer(trainer.phase, trainer.lesson)._taught(5, Randomness.at(0, 5))
    assert torch.equal(late[1], taught[5][1])


def test_a_discriminator_of_its_own_computes_blocks_anew_and_the_same(
    teacher: Bundle, source: object
) -> None:
    figures, calls = [], []
    for checkpointing in (False, True):
        trainer = AdversarialTrainer(
            phase(gradient_checkpointing=checkpointing), lesson(teacher, source)
        )
        calls.append(Mock(return_value=None))
        trainer.discriminator.encoder.down_blocks[0].resnets[0].register_forward_pre_hook(calls[-1])
        figures.append([trainer.iterate(i, Randomness.at(0, i)) for i in range(2)])
    assert [call.call_count for call in calls] == [
        6,
        10,
    ]  # of the three looks of an iteration, that at x_t alone has no backward pass
    assert figures[1] == [pytest.approx(before, rel=1e-4) for before in figures[0]]


def test_moments_in_8_bits_take_a_quarter_and_learn_as_well(
    teacher: Bundle, source: object
) -> None:
    def learn(optimiser: str) -> tuple[float, float]:
        settings = phase(
            objective="mse",
            student_steps=1,
            teacher_steps=2,
            learning_rate=1e-3,
            optimiser=optimiser,
        )
        trainer = RegressionTrainer(settings, lesson(teacher, source))
        losses = [trainer.iterate(i, Randomness.at(0, 0))["loss"] for i in range(30)]
        state = trainer.optimiser.state.values()
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
    ("objective", "reuse", "optimiser"),
    [
        ("mse", 1, "adamw"),
        ("mse", 2, "adamw"),
        ("conditional", 1, "adamw"),
        ("unconditional", 1, "adamw"),
        ("unconditional", 1, "adamw8bit"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    objective: str, reuse: int, optimiser: str, teacher: Bundle, source: object, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    shape = {"student_steps": 2, "teacher_steps": 4, "decay_share": 0.5}
    settings = phase(objective=objective, reuse=reuse, optimiser=optimiser, **shape)
    whole = lesson(teacher, source)
    train_phase(settings, whole, RunFolder(tmp_path / "whole", settings))
    with pytest.raises(Killed):
        train_phase(
            settings,
            lesson(teacher, source),
            RunFolder(tmp_path / "cut", settings),
            on_iteration=die,
        )
    resumed = lesson(teacher, source)
    train_phase(settings, resumed, RunFolder(tmp_path / "cut", settings))
    expected = whole.student.network.state_dict()
    assert all(
        torch.equal(value, expected[key])
        for key, value in resumed.student.network.state_dict().items()
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

    settings = phase()
    folder = RunFolder(tmp_path / "run", settings)
    with pytest.raises(
        TrainingError, match=r"discriminator loss is nan at iteration 3.*learning_rate"
    ):
        train_phase(settings, lesson(teacher, Poisoned()), folder)
    kept = folder.load(settings.name)
    assert kept is not None
    assert kept["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in kept["average"]["weights"].values())
