"""Health: looks are measured against the teacher's, what is ill is named, and a stage may go back
and try again.
"""

import json
import signal
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from twostep.distill.health import Health, Monitor, measure
from twostep.distill.method import Limit
from twostep.distill.samples import Examples
from twostep.distill.trainer import train_stage
from twostep.models.bundle import Bundle
from twostep.training.loop import TrainingError
from twostep.training.run_folder import RunFolder
from twostep.training.stopping import StoppedError

from .test_trainer import REGRESSION, UNCONDITIONAL, make_stage, make_student

PICTURES = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_student_like_its_teacher_has_no_symptoms() -> None:
    looks = measure(PICTURES, PICTURES)
    assert looks == pytest.approx({"saturation": 1, "contrast": 1, "diversity": 1})
    assert Monitor(Health(), {}).symptoms(looks) == []


def test_every_drift_is_named_with_its_figure() -> None:
    grey = PICTURES.mean(dim=2, keepdim=True).expand_as(PICTURES)
    assert measure(grey, PICTURES)["saturation"] == pytest.approx(0, abs=1e-6)
    assert measure(0.4 * PICTURES, PICTURES)["contrast"] == pytest.approx(0.4)
    assert measure(PICTURES[:1].expand_as(PICTURES), PICTURES)["diversity"] == 0
    monitor = Monitor(Health(), {})
    found = monitor.symptoms({"saturation": 0.1, "contrast": 1.6, "diversity": 0.2})
    assert [symptom.split()[0] for symptom in found] == ["saturation", "contrast", "diversity"]
    assert "0.10 of the teacher's" in found[0]


def test_a_figure_counts_as_its_mean_since_the_last_look() -> None:
    monitor = Monitor(Health(), {"gap": Limit(2.0, "too high a rate")})
    for gap in (9.0, -9.0, 0.5):
        monitor.add({"gap": gap, "accuracy": 99.0})
    assert monitor.symptoms({}) == []
    monitor.add({"gap": 5.0})
    assert monitor.symptoms({}) == ["gap is 5.0 (likely too high a rate)"]
    assert monitor.symptoms({}) == []


def test_the_adversarial_method_limits_the_gap_as_its_settings_say() -> None:
    stage = make_stage(method={**UNCONDITIONAL, "largest_gap": 3.0})
    assert stage.make_method().limits()["gap"].largest == 3.0
    assert make_stage(method=REGRESSION).make_method().limits() == {}


def test_it_gives_up_after_the_tries_it_has() -> None:
    monitor = Monitor(Health(action="rollback", most_rollbacks=2), {})
    assert [monitor.roll_back() for _ in range(3)] == [True, True, False]
    assert monitor.rate == 0.25
    again = Monitor(monitor.settings, {})
    again.load_state_dict(monitor.state_dict())
    assert (again.rate, again.num_rollbacks) == (0.25, 2)
    assert not Monitor(Health(), {}).roll_back()


def test_examples_are_measured_and_shown_beside_the_teacher(teacher: Bundle) -> None:
    sheet, looks = Examples.of(teacher, ("a red fox", "")).show(teacher.denoiser, 4)
    assert sheet.width > 2 * 64
    assert set(looks) == {"saturation", "contrast", "diversity"}
    object.__setattr__(teacher.contract, "guidance", 1.0)
    unguided = Examples.of(teacher, ("a red fox",))
    _, same = unguided.show(teacher.denoiser, teacher.contract.steps)
    assert same == pytest.approx({"saturation": 1, "contrast": 1, "diversity": 1})


def test_a_student_is_shown_by_the_sampler_that_it_declares(teacher: Bundle) -> None:
    examples = Examples.of(teacher, ("a red fox",))
    flow, again, renoised = (
        examples.draw(teacher.denoiser, examples.unguided, 2, sampler)
        for sampler in ("euler", "euler", "renoise")
    )
    assert torch.equal(flow, again)
    assert not torch.equal(flow, renoised)


def run(
    action: str, teacher: Bundle, source: object, folder: RunFolder, looks: list[dict[str, float]]
) -> None:
    """Train six iterations with a checkpoint after every second, at which the student looks as
    the list says.
    """
    stage = make_stage(
        method=UNCONDITIONAL,
        student_steps=8,
        teacher_steps=32,
        iterations=6,
        checkpoint_every=2,
    )
    train_stage(
        stage,
        source,
        teacher.denoiser,
        make_student(teacher),
        folder,
        health=Health(action=action, most_rollbacks=2),
        on_checkpoint=lambda iteration: looks.pop(0),
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", make_stage())


WELL = {"saturation": 1.0, "contrast": 1.0, "diversity": 1.0}
ILL = {**WELL, "contrast": 3.0}


def log_of(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder.path / "log.jsonl").read_text().splitlines()]


def test_a_warning_is_logged_and_shown_and_the_stage_goes_on(
    teacher: Bundle, source: object, run_folder: RunFolder
) -> None:
    with pytest.warns(UserWarning, match="contrast is 3.00 of the teacher's"):
        run("warn", teacher, source, run_folder, [ILL, WELL, WELL])
    lines = log_of(run_folder)
    assert [line["trouble"] for line in lines if "trouble" in line] == [
        "contrast is 3.00 of the teacher's (likely too high a learning_rate)"
    ]
    assert [line["contrast"] for line in lines if "contrast" in line] == [3.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_pause_keeps_the_checkpoint_and_the_same_command_goes_on(
    teacher: Bundle, source: object, run_folder: RunFolder
) -> None:
    with pytest.raises(TrainingError, match="paused at iteration 2"):
        run("pause", teacher, source, run_folder, [ILL])
    run("pause", teacher, source, run_folder, [WELL, WELL])
    kept = run_folder.load("8-adversarial-unconditional")
    assert kept is not None
    assert kept["iteration"] == 6


def test_a_rollback_tries_again_from_the_last_good_checkpoint_at_half_the_rate(
    teacher: Bundle, source: object, run_folder: RunFolder
) -> None:
    run("rollback", teacher, source, run_folder, [WELL, ILL, WELL, WELL])
    lines = log_of(run_folder)
    assert [
        (line["rate"], "contrast" in str(line["rolled_back"]))
        for line in lines
        if "rolled_back" in line
    ] == [(0.5, True)]
    kept = run_folder.load("8-adversarial-unconditional-health")
    assert kept == {"rate": 0.5, "num_rollbacks": 1}


@pytest.mark.slow
def test_it_stops_where_going_back_does_not_help(
    teacher: Bundle, source: object, run_folder: RunFolder
) -> None:
    with pytest.raises(TrainingError, match="contrast"):
        run("rollback", teacher, source, run_folder, [ILL, ILL, ILL])
    kept = run_folder.load("8-adversarial-unconditional")
    assert kept is not None
    assert kept["iteration"] == 0


@pytest.mark.slow
def test_a_loss_that_is_no_number_rolls_back_too(
    teacher: Bundle, source: object, run_folder: RunFolder
) -> None:
    student = make_student(teacher)
    stage = make_stage(
        method=REGRESSION, student_steps=32, teacher_steps=128, iterations=4, checkpoint_every=2
    )
    poisoned = iter([True])

    def poison(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3 and next(poisoned, False):
            nn.init.constant_(next(student.network.parameters()), float("nan"))

    train_stage(
        stage,
        source,
        teacher.denoiser,
        student,
        run_folder,
        health=Health(action="rollback"),
        on_iteration=poison,
    )
    assert all(torch.isfinite(value).all() for value in student.network.state_dict().values())
    assert [line["rate"] for line in log_of(run_folder) if "rolled_back" in line] == [0.5]


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 2])
def test_a_stop_changes_nothing_of_what_is_said_about_health(
    iteration: int, teacher: Bundle, source: object, tmp_path: Path
) -> None:
    """Asked to stop after an iteration, it does one more: stopped where a look is due, after two of
    them, or between two looks.
    """
    stage = make_stage(method={**UNCONDITIONAL, "largest_gap": 1e-9})
    looked: list[int] = []

    def train(folder: Path, stop_at: int | None = None) -> list[dict[str, object]]:
        run_folder = RunFolder(folder, stage)

        def stop(num_done: int, figures: dict[str, float]) -> None:
            if num_done == stop_at:
                signal.raise_signal(signal.SIGTERM)

        def look(num_done: int) -> dict[str, float]:
            looked.append(num_done)
            return WELL

        train_stage(
            stage,
            source,
            teacher.denoiser,
            make_student(teacher),
            run_folder,
            on_iteration=stop,
            on_checkpoint=look,
        )
        return log_of(run_folder)

    with pytest.warns(UserWarning, match="gap is"):
        whole = train(tmp_path / "whole")
    with pytest.raises(StoppedError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tmp_path / "stopped", iteration)
    with pytest.warns(UserWarning, match="gap is"):
        gone_on = train(tmp_path / "stopped")
    assert looked == [2, 4, 2, 4]
    clocks = {"time", "seconds_per_iteration"}
    assert [{key: line[key] for key in line.keys() - clocks} for line in gone_on] == [
        {key: line[key] for key in line.keys() - clocks} for line in whole
    ]
