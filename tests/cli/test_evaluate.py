"""`twostep evaluate` as a user runs it, on folders of PNGs that say what they
should show.
"""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from twostep.cli import app
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.prompt_sets import complete_tasks, real_pictures

from ..drawn import write_drawn


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(emoji: DrawingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = complete_tasks(emoji.concepts, 12)
    pictures = real_pictures([task.attributes for task in tasks], emoji)
    return write_drawn(
        tmp_path_factory.mktemp("pictures"), pictures, [task.prompt for task in tasks]
    )


def test_real_pictures_are_found_right(folder: Path, tmp_path: Path):
    answer = run(folder, "--reference", folder, "--json", tmp_path / "figures.json")
    assert answer.exit_code == 0, answer.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (
        figures["num_images"]
        == figures["concept"]["num_right"]
        == figures["background"]["num_right"]
        == 12
    )
    assert figures["frechet_to_reference"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["frechet_to_real"] > 0
    assert "100.0 % of 12" in answer.output


def test_prompts_that_name_something_else_are_not_scored_and_said_so(
    folder: Path, emoji: DrawingSet, tmp_path: Path
):
    picture = real_pictures([complete_tasks(emoji.concepts, 1)[0].attributes], emoji)
    write_drawn(tmp_path, picture.repeat(2, 1, 1, 1), ["a flat dragon", "a fox"])
    answer = run(tmp_path)
    assert answer.exit_code == 0, answer.output
    assert "100.0 % of 1" in answer.output
    assert "a-flat-dragon" in answer.stderr
    assert "1 picture(s) are not scored" in answer.stderr


def test_pictures_without_a_prompt_count_in_the_distances_only(tmp_path: Path):
    for number in range(3):
        Image.new("RGB", (64, 64), (200, number * 40, 0)).save(tmp_path / f"{number}.png")
    answer = run(tmp_path)
    assert answer.exit_code == 0, answer.output
    assert "not asked" in answer.output
    assert "3 picture(s) are not scored" in answer.stderr


def test_a_single_picture_is_scored_without_distances(emoji: DrawingSet, tmp_path: Path):
    task = complete_tasks(emoji.concepts, 1)[0]
    write_drawn(tmp_path, real_pictures([task.attributes], emoji), [task.prompt])
    answer = run(tmp_path)
    assert answer.exit_code == 0, answer.output
    assert "not measured" in answer.output


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "large"])
def test_a_folder_that_cannot_be_scored_is_named(what: str, tmp_path: Path):
    path = tmp_path / what
    if what != "missing":
        path.mkdir()
    if what == "damaged":
        (path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    if what == "large":
        Image.new("RGB", (128, 64)).save(path / "a.png")
    answer = run(path)
    assert answer.exit_code == 1
    expected = {
        "missing": "is no folder",
        "empty": "holds no PNG",
        "damaged": "cannot be read",
        "large": "128x64; the judge knows 64x64 only",
    }
    assert expected[what] in answer.stderr


def test_what_is_no_judge_is_named(folder: Path, tmp_path: Path):
    (tmp_path / "judge.safetensors").write_bytes(b"no judge")
    answer = run(folder, "--judge", tmp_path / "judge.safetensors")
    assert "no judge, or a damaged one" in answer.stderr
