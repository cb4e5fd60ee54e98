"""`twostep cache`, and distilling from what it made, as a user types it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from twostep.models.bundle import load_bundle

RECIPE = """
model = "{model}"
data = "{data}"
release = [4]
sample_prompts = ["a red fox"]

[[phases]]
student_steps = 4
teacher_steps = 8
objective = "conditional"
lora_rank = 2
iterations = 2
batch_size = 2
learning_rate = 1e-4
precision = "fp32"
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (70, 64), (80 * number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a red fox")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("a bird")
    return folder


def test_own_pictures_are_cached_and_distilled(run: Callable, model: Path, pictures: Path, tmp_path: Path) -> None:
    done = run("cache", pictures, "--model", model, "--out", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert "3 items in 1 shards, 1 skipped" in done.output
    assert "skipped broken.png: it cannot be read" in done.output
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(model=model, data=tmp_path / "cache"))
    done = run("distill", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    student = load_bundle(tmp_path / "run" / "model" / "students" / "random_4step_lora.safetensors")
    assert (student.contract.lora_rank, student.contract.recipe) == (2, "mine")


def test_prompts_alone_are_enough(run: Callable, model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\n\na bird\n")
    done = run("cache", prompts, "--model", model, "--out", tmp_path / "cache", "--steps", 2, "--guidance", 2)
    assert done.exit_code == 0, done.output
    assert "2 items in 1 shards, 0 skipped" in done.output


def test_a_source_without_pictures_is_told_in_one_line(run: Callable, tmp_path: Path) -> None:
    done = run("cache", tmp_path, "--out", tmp_path / "cache")
    assert done.exit_code == 1
    assert "holds no pictures" in done.output
    assert "Traceback" not in done.output
