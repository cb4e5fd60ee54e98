"""Comparisons: rows, refusals, tables that say what was measured, pages that need nothing else."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.distill.test_chain import CONDITIONAL, REGRESSION, make_recipe, stage
from twostep.cli import app
from twostep.contract import VariancePreservingSpec, student_name
from twostep.distill import DistillRecipe
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle, save_student
from twostep.pretrain.model import random_bundle
from twostep.reports.comparison import Comparison, ComparisonError, compare, strip
from twostep.reports.comparison_page import write_comparison
from twostep.reports.comparison_table import lines, to_csv, to_json, to_markdown
from twostep.training.run_folder import RunFolder

RECIPE = make_recipe(
    stage(8, 32, REGRESSION, guidance=3.0),
    stage(4, 8, CONDITIONAL),
    stage(2, 4, REGRESSION),
    release=[4, 2],
)


def write_run(path: Path, recipe: DistillRecipe = RECIPE) -> Path:
    """Write what a run of a random teacher leaves, with students that were trained as little."""
    teacher = random_bundle()
    teacher = replace(teacher, contract=replace(teacher.contract, steps=3))
    folder = RunFolder(path, recipe)
    save_bundle(teacher, path / "model")
    for steps in recipe.release:
        contract = replace(
            teacher.contract,
            name=student_name(teacher.contract.base, steps),
            role="student",
            steps=steps,
            trained_times=tuple(range(1000, 0, -1000 // steps)),
            guidance=1.0,
            recipe="tiny",
        )
        weights = random_bundle(seed=steps).denoiser.network.state_dict()
        save_student(weights, contract, path / "model")
    for each in recipe.stages:
        folder.log(part=each.name, iteration=each.iterations, seconds_per_iteration=2.5)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("compared") / "run")


@pytest.fixture(scope="module")
def comparison(run: Path) -> Comparison:
    return compare([str(run)], num_pictures=3)


def test_every_student_is_there_with_what_needs_no_training(comparison: Comparison) -> None:
    assert [measured.row.label for measured in comparison.rows] == [
        "teacher, 3 steps",
        "tiny, 4 steps",
        "tiny, 2 steps",
        "teacher, 2 steps, guidance, euler",
        "teacher, 2 steps, guidance, unipc",
        "teacher, 1 step, guidance, euler",
    ]
    assert [measured.row.calls for measured in comparison.rows] == [6, 4, 2, 4, 4, 2]
    assert all(measured.reports["open"].num_images == 3 for measured in comparison.rows)
    assert all(measured.seconds > 0 for measured in comparison.rows)


def test_the_teacher_is_loyal_to_itself(comparison: Comparison) -> None:
    loyalty = comparison.teacher.reports["complete"].loyalty
    assert loyalty is not None
    assert loyalty.value == 1
    others = [m.reports["complete"].loyalty for m in comparison.rows[1:]]
    assert all(other is not None and other.value < 1 for other in others)


def test_training_is_added_up_over_the_chain(comparison: Comparison) -> None:
    training = {m.row.steps: m.row.training for m in comparison.rows if m.row.is_student}
    first, second, third = RECIPE.stages
    examples = [each.iterations * each.batch_size for each in RECIPE.stages]
    assert training[4] is not None
    assert training[2] is not None
    # 32 guided steps for 8 of the student: 4 steps of two calls; then 2 steps of one, twice.
    assert training[2].teacher_calls == 8 * examples[0] + 2 * examples[1] + 2 * examples[2]
    assert training[4].teacher_calls == 8 * examples[0] + 2 * examples[1]
    assert training[4].student_examples == examples[0] + examples[1]
    # The discriminator of the stage in the middle.
    assert training[4].other_examples == training[2].other_examples == examples[1]
    assert training[4].seconds == 2.5 * (first.iterations + second.iterations)
    assert training[2].seconds == 2.5 * sum(each.iterations for each in (first, second, third))


def test_markdown_and_csv_say_the_same(comparison: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    first = comparison.rows[1]
    (value,) = [
        float(row["value"])
        for row in rows
        if row["label"] == first.row.label
        and row["set"] == "complete"
        and row["figure"] == "frechet_to_reference"
    ]
    text = to_markdown(comparison)
    (line,) = [
        line
        for line in text.split("### Complete")[1].split("### What")[0].splitlines()
        if line.startswith(f"| {first.row.label} |")
    ]
    assert f"{value:.2f} (" in line
    values = json.loads(to_json(comparison))
    assert values["rows"][1]["reports"]["complete"]["frechet_to_reference"]["value"] == value
    assert "pip install 'twostep[second-judge]'" in text


def test_seeds_share_a_line_with_their_range(comparison: Comparison) -> None:
    measured = comparison.rows[1]
    twin = replace(measured, row=replace(measured.row, source="another"))
    both = replace(comparison, rows=(*comparison.rows, twin))
    found = [line for line in lines(both, "open") if "2 seeds" in line.label]
    assert len(found) == 1
    share = 100 * (measured.reports["open"].off_palette.share or 0)
    assert str(found[0].cells[0]) == f"{share:.1f} ({share:.1f} to {share:.1f})"


def test_pages_need_nothing_else(comparison: Comparison, tmp_path: Path) -> None:
    written = write_comparison(comparison, tmp_path)
    assert [path.name for path in written] == [
        "table.md",
        "table.csv",
        "table.json",
        "index.html",
        "vote.html",
    ]
    for name in ("index.html", "vote.html"):
        page = (tmp_path / name).read_text()
        fetched = re.findall(r"(?:src|href)=\"?([^\" >]+)", page)
        local = {"vote.html", "table.csv", "table.json", "table.md"}
        assert all(each.startswith("data:") or each in local for each in fetched)
    vote = (tmp_path / "vote.html").read_text()
    (data,) = re.findall(r'<script id=data type="application/json">(.*?)</script>', vote, re.S)
    values = json.loads(data)
    assert values["rows"] == [measured.row.label for measured in comparison.rows]
    assert len(values["prompts"]) == len(values["sets"]) == 6
    # No name stands where a voter sees it.
    assert not any(name in vote.replace(data, "") for name in values["rows"])


def test_pictures_lie_side_by_side() -> None:
    pictures = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    laid = strip(pictures)
    assert laid.shape == (4, 10, 3)
    assert torch.equal(laid[:, 5:].permute(2, 0, 1), pictures[1])


def test_models_of_other_teachers_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(run / "model", other)
    teacher = load_bundle(other)
    save_bundle(replace(random_bundle(seed=1), contract=teacher.contract), other)
    with pytest.raises(ComparisonError, match="different teachers"):
        compare([str(run), str(other)])


def test_models_of_other_schedules_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "model"
    shutil.copytree(run / "model", other)
    shutil.rmtree(other / "students")
    teacher = load_bundle(other)
    schedule = replace(VariancePreservingSpec(), beta_end=0.02)
    save_bundle(replace(teacher, contract=replace(teacher.contract, schedule=schedule)), other)
    with pytest.raises(ComparisonError, match="different noise schedules"):
        compare([str(run), str(other)])


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    save_bundle(random_bundle(), folder)
    with pytest.raises(ComparisonError, match="no student here yet"):
        compare([str(folder)])
    run = tmp_path / "run"
    RunFolder(run, RECIPE)
    with pytest.raises(ComparisonError, match="has no teacher in its folder model"):
        compare([str(run)])
    answer = CliRunner().invoke(app, ["compare", str(tmp_path / "nothing")])
    assert answer.exit_code == 1
    assert "does not exist" in answer.stderr


@pytest.mark.slow
def test_runs_that_differ_in_their_seed_alone_share_a_line(tmp_path: Path) -> None:
    recipes = [
        RECIPE.model_copy(
            update={
                "stages": tuple(each.model_copy(update={"seed": seed}) for each in RECIPE.stages),
                "release": (2,),
            }
        )
        for seed in (0, 1)
    ]
    runs = [str(write_run(tmp_path / f"run{i}", recipe)) for i, recipe in enumerate(recipes)]
    comparison = compare(runs, num_pictures=2)
    labels = [line.label for line in lines(comparison, "open")]
    assert "tiny, 2 steps, 2 seeds" in labels
    assert len(labels) == len(comparison.rows) - 1


def test_a_student_is_drawn_at_the_times_of_its_contract(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_recipe(stage(2, 4, REGRESSION), release=[2]))
    path = run / "model"
    at_grid = compare([str(path)], num_pictures=2)
    student = load_bundle(str(path), steps=2)
    contract = replace(student.contract, sampler="renoise", trained_times=(1000, 250))
    for times in ((1000, 250), ()):
        changed = replace(contract, sampling_times=times)
        save_student(student.denoiser.network.state_dict(), changed, path)
        compared = compare([str(path)], num_pictures=2)
        row = compared.rows[1].row
        assert row.sampler == "renoise"
        assert row.times == ((*times, 0) if times else None)
        shown = compared.rows[1].shown["open"]
        assert not torch.equal(shown, at_grid.rows[1].shown["open"])
        if times:
            apart = shown
    assert not torch.equal(shown, apart)
