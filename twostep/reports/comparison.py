"""`twostep compare`: runs and models of one teacher, drawn and measured alike.

Every row draws the same prompts from the same noise on one `Bench`: the teacher itself, the
students of the runs and models that were named, and what the teacher does without any training at
as many network calls. `comparison_table` makes tables of it, `comparison_page` pages.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from jaxtyping import UInt8
from pydantic import ValidationError
from torch import Tensor

from twostep.contract import Contract
from twostep.diffusion.samplers import SOLVERS
from twostep.diffusion.shapes import Time
from twostep.distill.recipe import DistillRecipe, Stage
from twostep.errors import TwostepError
from twostep.evaluate.judge import load_judge
from twostep.evaluate.measurements import SecondJudge
from twostep.evaluate.metrics import Report
from twostep.formats import Checkpoint, resolve
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.denoiser import Denoiser
from twostep.reports.benchmark import (
    NUM_PICTURES,
    SETS,
    Bench,
    Pictures,
    draw_student,
    weights_digest,
)
from twostep.training.device import find_device
from twostep.training.recipe import RecipeError, recipe_text
from twostep.training.run_log import SECONDS, read_log

NUM_SHOWN = 24
"""Pictures of each set of prompts that pages show, and that may be voted on."""

_NUM_TIMED = 3

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


class ComparisonError(TwostepError):
    """Runs or models that cannot be compared."""


@dataclass(frozen=True)
class TrainingCost:
    """What it took to train a student, through all the stages that led to it.

    Attributes:
        teacher_calls: network calls of teachers; guidance counts twice.
        student_examples: examples of the student's optimiser steps, each a forward and a backward
            pass at least.
        other_examples: the same of all other networks together, such as the discriminator.
        seconds: by the run's log; None if it says nothing.
    """

    teacher_calls: float
    student_examples: int
    other_examples: int
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Row:
    """One way of drawing that is compared.

    Attributes:
        label: what it is called in tables.
        source: the run or the model that it comes from.
        group: equal for trainings that differ in their seed alone.
        is_student: whether it was trained for its steps.
        steps: along the trailing grid.
        times: that are visited in place of that grid, falling, with the landing; None for the grid.
        scale: of the guidance.
        sampler: by name.
        load: reads the denoiser.
        training: what its training took; None where that is not known, or nothing was trained.
    """

    label: str
    source: str
    group: str
    is_student: bool
    steps: int
    scale: float
    sampler: str
    load: Callable[[], Denoiser]
    training: TrainingCost | None = None
    times: tuple[Time, ...] | None = None

    @property
    def calls(self) -> int:
        """Network calls for one picture; guidance takes two at every step."""
        return self.steps * (1 if self.scale == 1 else 2)


@dataclass(frozen=True, eq=False)
class Measured:
    """A row and what was measured of it.

    Attributes:
        row: that was drawn.
        reports: by set of prompts.
        seconds: to draw one picture alone, in the middle of three times.
        shown: its first pictures of each set.
    """

    row: Row
    reports: dict[str, Report]
    seconds: float
    shown: dict[str, Pictures]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows; the teacher comes first.

    Attributes:
        rows: measured.
        prompts: of the pictures that are shown, by set.
        num_pictures: that were measured of each set and row.
        machine: on which the times were taken.
        has_second_judge: whether distances were taken in the second judge's features too.
    """

    rows: tuple[Measured, ...]
    prompts: dict[str, tuple[str, ...]]
    num_pictures: int
    machine: str
    has_second_judge: bool

    @property
    def teacher(self) -> Measured:
        """The teacher, which is the measure of all others."""
        return self.rows[0]


def compare(
    names: Sequence[str],
    *,
    num_pictures: int = NUM_PICTURES,
    judge: Path | None = None,
    second: SecondJudge | None = None,
    device: str = "auto",
    cache: Path | None = None,
    on_progress: OnProgress = lambda done, total, words: None,
) -> Comparison:
    """Draw and measure the students of runs and models beside their teacher.

    Args:
        names: folders of `twostep distill`, model folders, built-in names, or files of students.
        num_pictures: of each set of prompts.
        judge: a judge.safetensors; None for the built-in one.
        second: a second judge.
        device: where to compute.
        cache: folder of pictures that were drawn before; None to keep none.
        on_progress: told of every batch of pictures.

    Raises:
        ComparisonError: they have different teachers or schedules, no student at all, or a run has
            no model.
        ModelError: a name means no model.
    """
    entries = [entry for name in names for entry in _entries(name)]
    teacher = _only_teacher(entries).to(find_device(device))
    rows = _rows(entries, teacher)
    total = (4 + 2 * len(rows)) * num_pictures
    num_drawn = 0
    words = "teacher"

    def on_batch(count: int) -> None:
        nonlocal num_drawn
        num_drawn += count
        on_progress(num_drawn, total, words)

    bench = Bench.of(
        teacher,
        num_pictures=num_pictures,
        judge=None if judge is None else load_judge(judge),
        second=second,
        cache=cache,
        on_batch=on_batch,
    )
    measured = [_measure_teacher(bench)]
    for row in rows:
        words = row.label
        measured.append(_measure(row, bench))
    return Comparison(
        rows=tuple(measured),
        prompts={
            name: tuple(task.prompt for task in bench.tasks[name][:NUM_SHOWN]) for name in SETS
        },
        num_pictures=num_pictures,
        machine=str(teacher.denoiser.device),
        has_second_judge=second is not None,
    )


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one name stands for.

    Attributes:
        name: as it was given.
        run: the folder of the run, if it is one.
        model: a folder or a file of a student.
    """

    name: str
    run: Path | None
    model: Checkpoint

    def teacher(self) -> Bundle:
        """Return the teacher of the students."""
        if self.model.is_folder:
            return load_bundle(self.model)
        # Its file lies in its teacher's folder, or names a built-in teacher.
        folder = self.model.path.parent.parent
        if (folder / "model_index.json").is_file():
            return load_bundle(folder)
        return load_bundle(self.model.contract.base)


def _entries(name: str) -> Iterator[_Entry]:
    """Yield what a name stands for; ComparisonError for a run that has no model of its own."""
    path = Path(name)
    if not (path / "run.toml").is_file():
        yield _Entry(name, None, resolve(name))
        return
    model = path / "model"
    if not (model / "model_index.json").is_file():
        raise ComparisonError(
            f"{path} has no teacher in its folder model, as runs with a style or from a student "
            "have none: it is not known what its students are to be measured against."
        )
    yield _Entry(name, path, resolve(model))


def _only_teacher(entries: Sequence[_Entry]) -> Bundle:
    """Return the teacher that all entries share; ComparisonError if there are several."""
    first = entries[0].teacher()
    digest = weights_digest(first, first.denoiser)
    for entry in entries[1:]:
        other = entry.teacher()
        if other.contract.schedule != first.contract.schedule:
            raise ComparisonError(
                f"{entries[0].name} and {entry.name} have different noise schedules; compare each "
                "with what shares its own."
            )
        if weights_digest(other, other.denoiser) != digest:
            raise ComparisonError(
                f"{entries[0].name} and {entry.name} were distilled from different teachers, so "
                "their distances to them cannot be compared. Compare students of one teacher."
            )
    return first


def _rows(entries: Sequence[_Entry], teacher: Bundle) -> list[Row]:
    """Return the rows after the teacher's: students by falling steps, then what needs no training.

    Raises ComparisonError if there is no student.
    """
    students = [row for entry in entries for row in _students(entry)]
    if not students:
        names = ", ".join(entry.name for entry in entries)
        raise ComparisonError(f"{names}: there is no student here yet to compare with its teacher.")
    students.sort(key=lambda row: -row.steps)
    labels = [row.label for row in students]
    named = [
        replace(row, label=f"{row.label} ({row.source})") if labels.count(row.label) > 1 else row
        for row in students
    ]
    budgets = sorted({row.calls for row in students}, reverse=True)
    return [*named, *_untrained(teacher, budgets)]


def _students(entry: _Entry) -> Iterator[Row]:
    """Yield the students of an entry, whole networks and LoRAs."""
    recipe = None if entry.run is None else _recipe(entry.run)
    checkpoints = [entry.model]
    if entry.model.is_folder:
        found = [*entry.model.students.values(), *entry.model.student_loras.values()]
        checkpoints = list({student.path: student for student in found}.values())
    for checkpoint in checkpoints:
        contract = checkpoint.contract
        if contract.role != "student" or (recipe and contract.steps not in recipe.release):
            continue
        lora = "" if contract.lora_rank is None else f", LoRA of rank {contract.lora_rank}"
        yield Row(
            label=f"{contract.recipe}, {_counted(contract.steps)}{lora}",
            source=entry.name,
            group=_group(entry, recipe, contract),
            is_student=True,
            steps=contract.steps,
            scale=1.0,
            sampler=contract.sampler,
            load=partial(_load, checkpoint),
            training=None if recipe is None else _training(recipe, contract.steps, entry.run),
            times=(*contract.sampling_times, 0) if contract.sampling_times else None,
        )


def _load(checkpoint: Checkpoint) -> Denoiser:
    return load_bundle(checkpoint).denoiser


def _untrained(teacher: Bundle, budgets: Sequence[int]) -> Iterator[Row]:
    """Yield what the teacher does at so many network calls, with every solver, untrained."""
    for calls in budgets:
        if calls == 1:
            yield _teacher_row(teacher, 1, 1.0, "euler")
            continue
        steps = calls // 2
        for solver in SOLVERS if steps > 1 else SOLVERS[:1]:
            # A multistep solver is Euler in its first step and in one that lands on clean latents.
            if solver == "dpmpp-2m" and steps == 2:
                continue
            yield _teacher_row(teacher, steps, teacher.contract.guidance, solver)


def _teacher_row(teacher: Bundle, steps: int, scale: float, sampler: str) -> Row:
    guidance = "no guidance" if scale == 1 else "guidance"
    label = f"teacher, {_counted(steps)}, {guidance}, {sampler}"
    return Row(
        label=label,
        source="teacher",
        group=label,
        is_student=False,
        steps=steps,
        scale=scale,
        sampler=sampler,
        load=lambda: teacher.denoiser,
    )


def _measure_teacher(bench: Bench) -> Measured:
    contract = bench.teacher.contract
    row = _teacher_row(bench.teacher, contract.steps, contract.guidance, "euler")
    row = replace(row, label=f"teacher, {_counted(contract.steps)}", group="teacher")
    shown = {name: bench.own_pictures[name][:NUM_SHOWN] for name in SETS}
    return Measured(row, bench.report_teacher(), _seconds(row, row.load(), bench), shown)


def _measure(row: Row, bench: Bench) -> Measured:
    denoiser = row.load()
    # The rest of what was loaded with it is the teacher's, which is there already.
    denoiser.network.to(bench.teacher.denoiser.device)
    drawn = draw_student(denoiser, bench, **_way(row))
    return Measured(
        row,
        reports={name: bench.report(pictures, name) for name, pictures in drawn.items()},
        seconds=_seconds(row, denoiser, bench),
        shown={name: pictures[:NUM_SHOWN] for name, pictures in drawn.items()},
    )


def _way(row: Row) -> dict[str, Any]:
    """Return how a row is drawn, as the bench takes it."""
    return {
        "steps": row.steps,
        "times": row.times,
        "scale": row.scale,
        "sampler": row.sampler,
    }


def _seconds(row: Row, denoiser: Denoiser, bench: Bench) -> float:
    """Return how long one picture takes by itself, prompt and decoding included."""
    uncached = replace(bench, cache=None, on_batch=lambda count: None)
    task = bench.tasks["complete"][:1]
    times = []
    for _ in range(_NUM_TIMED):
        began = time.perf_counter()
        uncached.draw(denoiser, task, **_way(row))
        times.append(time.perf_counter() - began)
    return median(times)


def _recipe(run: Path) -> DistillRecipe:
    """Return the recipe of a run; ComparisonError if it cannot be read any more."""
    try:
        values = tomllib.loads(recipe_text(run / "run.toml"))
        return DistillRecipe.model_validate(values)
    except (ValidationError, tomllib.TOMLDecodeError, RecipeError) as error:
        raise ComparisonError(
            f"the recipe of {run} cannot be read: {error}. Compare its model folder instead: "
            f"{run / 'model'}"
        ) from error


def _group(entry: _Entry, recipe: DistillRecipe | None, contract: Contract) -> str:
    """Return what trainings have in common that differ in their seed alone."""
    if recipe is None:
        return f"{entry.name} {contract.name} {contract.lora_rank}"
    values = recipe.model_dump(mode="json")
    for stage in values["stages"]:
        stage.pop("seed")
    values.pop("device")
    # The teacher is the same by its weights, wherever it lies.
    values.pop("model")
    return f"{json.dumps(values, sort_keys=True)} {contract.steps} {contract.lora_rank}"


def _training(recipe: DistillRecipe, steps: int, run: Path | None) -> TrainingCost:
    """Add up the stages of a run until the student of so many steps is finished."""
    last = max(i for i, stage in enumerate(recipe.stages) if stage.student_steps == steps)
    stages = recipe.stages[: last + 1]
    pace = {} if run is None else _seconds_by_stage(run / "log.jsonl")
    calls = 0.0
    examples = {"student": 0, "other": 0}
    for stage in stages:
        method = stage.make_method()
        calls += method.cost().teacher_evaluations * stage.iterations * stage.batch_size
        for iteration in range(stage.iterations):
            for role in method.turns(iteration):
                key = role if role == "student" else "other"
                examples[key] += stage.batch_size
    return TrainingCost(
        teacher_calls=calls,
        student_examples=examples["student"],
        other_examples=examples["other"],
        seconds=_total_seconds(stages, pace),
    )


def _total_seconds(stages: Sequence[Stage], pace: dict[str, float]) -> float | None:
    """Return how long stages took; None if the log lacks one of them."""
    if any(stage.name not in pace for stage in stages):
        return None
    return sum(pace[stage.name] * stage.iterations for stage in stages)


def _seconds_by_stage(log: Path) -> dict[str, float]:
    """Return the last pace of each stage in a run's log, in seconds per iteration."""
    lines, _ = read_log(log)
    return {line["part"]: float(line[SECONDS]) for line in lines if SECONDS in line}


def _counted(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def strip(pictures: UInt8[Tensor, "items 3 height width"]) -> UInt8[Tensor, "height total_width 3"]:
    """Lay pictures side by side."""
    return pictures.permute(2, 0, 3, 1).flatten(1, 2).contiguous()
