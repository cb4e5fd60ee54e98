"""Reproducing a table: its plan, what is refused before hours are spent, and a tiny one whole."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill import DistillRecipe
from twostep.reports.reproduction import Reproduction, Table, in_words, load_table, table_names
from twostep.training.recipe import RecipeError, load_recipe

TINY = """
weights = "nano"
teacher = "nano-teacher"
judge = "nano-judge"

[[parts]]
recipe = "nano-judge"
minutes = 1
overrides = ["loop.iterations=1", "loop.batch_size=2", "num_held_out=1"]

[[parts]]
recipe = "nano-vae"
minutes = 1
overrides = ["loop.iterations=1", "loop.batch_size=2", "num_pictures=8"]

[[parts]]
recipe = "nano-text"
minutes = 1
overrides = ["loop.iterations=1", "loop.batch_size=4"]

[[parts]]
recipe = "nano-teacher"
minutes = 1
inputs = { autoencoder = "nano-vae", text_encoders = "nano-text" }
overrides = ["loop.iterations=1", "loop.batch_size=2", "variants=1"]

[[rows]]
recipe = "tiny-chain.toml"
seeds = [0, 1]
minutes = 2
"""

TINY_CHAIN = """
model = "nano"
data = "builtin"
data_options = { variants = 1 }
release = [2]
sample_prompts = ["a flat fox"]

[[stages]]
student_steps = 2
teacher_steps = 4
guidance = 3.0
iterations = 1
batch_size = 2
learning_rate = 1e-4
checkpoint_every = 1
warmup_iterations = 1
log_every = 1

[stages.method]
name = "regression"
"""


def test_the_tables_of_the_package_can_be_made(tmp_path: Path) -> None:
    assert table_names() == ["nano-table"]
    table = load_table("nano-table")
    reproduction = Reproduction(table, tmp_path)
    names = [step.name for step in reproduction.steps]
    assert len(set(names)) == len(names)
    assert names.index("nano-vae") < names.index("nano-teacher") < names.index("nano-seed0")
    assert reproduction.remaining_minutes() == sum(s.minutes or 0 for s in reproduction.steps)
    for row in table.rows:
        recipe = load_recipe(row.recipe, DistillRecipe, row.overrides)
        assert recipe.release
    assert not any(tmp_path.iterdir())


def test_what_is_left_goes_as_fast_as_what_is_done(tmp_path: Path) -> None:
    table = load_table("nano-table")
    first, second = table.parts[0], table.parts[1]
    # Twice as long as the table says.
    seconds = {part.recipe: 120 * part.minutes for part in (first, second)}
    (tmp_path / "finished.json").write_text(json.dumps(seconds))
    reproduction = Reproduction(table, tmp_path)
    rest = sum(s.minutes or 0 for s in reproduction.steps if s.name not in seconds)
    assert reproduction.remaining_minutes() == pytest.approx(2 * rest)
    assert in_words(25.4) == "25 minutes"
    assert in_words(288.0) == "4.8 hours"


def test_what_was_never_measured_is_said_to_be_unknown(tmp_path: Path) -> None:
    table = changed(rows=[{"recipe": "nano", "minutes": 90}, {"recipe": "nano-mse"}])
    reproduction = Reproduction(table, tmp_path)
    assert reproduction.num_unmeasured == 1
    measured = sum(part.minutes for part in table.parts) + 90
    assert reproduction.remaining_minutes() == measured


def changed(**values: object) -> Table:
    return Table.model_validate({**load_table("nano-table").model_dump(), **values})


def test_what_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no table 'nano-tabel'"):
        load_table("nano-tabel")
    with pytest.raises(RecipeError, match="has no part 'other'"):
        Reproduction(changed(judge="other"), tmp_path)
    with pytest.raises(RecipeError, match="no recipe 'nano-lcn'"):
        Reproduction(changed(rows=[{"recipe": "nano-lcn", "minutes": 1}]), tmp_path)
    with pytest.raises(RecipeError, match="start from the teacher"):
        Reproduction(changed(rows=[{"recipe": "nano-style", "minutes": 1}]), tmp_path)
    parts = [part.model_dump() for part in load_table("nano-table").parts]
    with pytest.raises(RecipeError, match="no part before it"):
        Reproduction(changed(parts=parts[::-1]), tmp_path)


@pytest.mark.slow
def test_a_tiny_table_is_made_from_the_drawings_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny-chain.toml").write_text(TINY_CHAIN)
    Path("tiny.toml").write_text(TINY)
    out = tmp_path / "out"
    arguments = ["reproduce", "tiny.toml", "--out", str(out), "--pictures", "2"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    finished = json.loads((out / "finished.json").read_text())
    assert set(finished) == {
        "nano-judge",
        "nano-vae",
        "nano-text",
        "nano-teacher",
        "tiny-chain-seed0",
        "tiny-chain-seed1",
    }
    assert "tiny-chain, 2 steps, 2 seeds" in (out / "table.md").read_text()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert "begins" not in again.output
    assert json.loads((out / "finished.json").read_text()) == finished
