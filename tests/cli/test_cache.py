"""`twostep cache`, and distilling from what it made, as a user types it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from twostep.models.loading import load_bundle
from twostep.networks.adapters import PREFIX, add_lora

RECIPE = """
model = "{model}"
data = "{data}"
release = [4]
sample_prompts = ["a red fox"]

[[stages]]
student_steps = 4
teacher_steps = 8
method = {{ name = "adversarial", objective = "conditional" }}
lora_rank = 2
iterations = 2
batch_size = 2
learning_rate = 1e-4
precision = "bf16"
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


def test_own_pictures_are_cached_and_distilled(
    run: Callable, model: Path, pictures: Path, tmp_path: Path
) -> None:
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
    done = run(
        "cache",
        prompts,
        "--model",
        model,
        "--out",
        tmp_path / "cache",
        "--steps",
        2,
        "--guidance",
        2,
    )
    assert done.exit_code == 0, done.output
    assert "2 items in 1 shards, 0 skipped" in done.output


@pytest.mark.slow
def test_a_style_is_trained_on_the_two_step_student_and_drawn_with(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    style = tmp_path / "ink.safetensors"
    lora = add_lora(load_bundle(model).denoiser.network, "ink", rank=2, targets=("to_q",))
    save_file({f"{PREFIX}{key}": value + 0.1 for key, value in lora.state_dict().items()}, style)
    (tmp_path / "prompts.txt").write_text("a red fox\na bird")
    cache = ("cache", tmp_path / "prompts.txt", "--model", model, "--steps", 2)
    assert run(*cache, "--out", tmp_path / "plain").exit_code == 0
    assert run(*cache, "--lora", f"{style}:0.9", "--out", tmp_path / "cache").exit_code == 0
    plain, styled = (
        load_file(tmp_path / name / "shard-00000.safetensors") for name in ("plain", "cache")
    )
    assert not torch.equal(plain["latents"], styled["latents"])
    recipe = tmp_path / "mine.toml"
    told = f'start_steps = 2\nstyle_lora = "{style}"\n' + RECIPE.format(
        model=model, data=tmp_path / "cache"
    )
    recipe.write_text(
        told.replace("= [4]", "= [2]").replace("student_steps = 4", "student_steps = 2")
    )
    done = run("distill", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    trained = tmp_path / "run" / "model" / "students" / "ink_2step_lora.safetensors"
    draw = ("generate", "a red fox", "--model", model, "--lora", trained, "--out", tmp_path / "out")
    told = run(*draw, "--steps", 2)
    assert told.exit_code == 0, told.output
    by_default = run(*draw)  # its student's two steps are meant where none are named
    assert by_default.exit_code == 0, by_default.output
    refused = run(*draw, "--steps", 4)
    assert refused.exit_code == 1
    assert "2" in refused.output and "Traceback" not in refused.output


def test_a_source_without_pictures_is_told_in_one_line(run: Callable, tmp_path: Path) -> None:
    done = run("cache", tmp_path, "--out", tmp_path / "cache")
    assert done.exit_code == 1
    assert "holds no pictures" in done.output
    assert "Traceback" not in done.output
