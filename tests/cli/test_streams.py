"""What goes where: paths alone on standard output, and quiet ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from PIL import Image

import twostep
from twostep.cli import app
from twostep.formats.locate import find_model
from twostep.pipeline.provenance import read_provenance

from .test_draw import PROMPT, assert_one_clean_line

JAPANESE = "青い背景の赤いりんご"


def test_version(run) -> None:
    answer = run("--version")
    assert (answer.exit_code, answer.stdout) == (0, f"{twostep.__version__}\n")


def test_every_verb_says_its_help(run) -> None:
    # What looks like markup in a help text breaks it.
    for name in typer.main.get_command(app).commands:
        answer = run(name, "--help")
        assert answer.exit_code == 0, (name, answer.exception)


def test_standard_output_is_paths_alone_whatever_the_script(
    run, model: Path, tmp_path: Path
) -> None:
    answer = run("generate", JAPANESE, "--model", model, "-n", 2, "-o", tmp_path)
    assert answer.exit_code == 0, answer.output
    paths = [Path(line) for line in answer.stdout.splitlines()]
    assert [path.name for path in paths] == [
        f"{JAPANESE}_random-2step_{seed}.png" for seed in (0, 1)
    ]
    assert all(path.is_file() for path in paths)
    assert "2 images" in answer.stderr


def test_a_random_seed_is_said_and_kept(run, model: Path, tmp_path: Path) -> None:
    seeds = set()
    for _ in range(2):
        answer = run("generate", PROMPT, "--model", model, "--seed", "random", "-o", tmp_path)
        assert answer.exit_code == 0, answer.output
        (said,) = [line for line in answer.stderr.splitlines() if line.startswith("seed ")]
        seed = read_provenance(answer.stdout.strip()).request.seed
        assert said == f"seed {seed}" and 0 <= seed < 2**32
        seeds.add(seed)
    assert len(seeds) == 2
    answer = run("generate", PROMPT, "--model", model, "--seed", "lucky", "-o", tmp_path)
    assert_one_clean_line(answer, "expected a whole number from 0 up, or random")


def test_a_style_alone_keeps_the_default_of_two_steps(run, model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    key = "lora_unet_down_blocks_1_attentions_0_proj_in"
    weight = twostep.load(model).parts["unet"].down_blocks[1].attentions[0].proj_in.weight
    style = {
        f"{key}.lora_down.weight": torch.ones(1, *weight.shape[1:]),
        f"{key}.lora_up.weight": torch.ones(len(weight), 1, *[1] * (weight.dim() - 2)),
    }
    save_file(style, tmp_path / "ink.safetensors")
    lora = tmp_path / "ink.safetensors"
    for words in ((PROMPT, "--lora", f"{lora}:0.5"), (f"{PROMPT} <lora:{lora}:0.5>",)):
        answer = run("generate", *words, "--model", model, "-o", tmp_path / "out")
        assert answer.exit_code == 0, answer.output
        provenance = read_provenance(answer.stdout.strip())
        assert provenance.contract.name == "random-2step+ink:0.5"
        assert provenance.request.prompt == PROMPT
        assert provenance.lora_hashes.keys() == {str(lora)}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A picture with a LoRA, and the LoRA's file, which lies beside it."""
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("moved")
    lora = folder / "a.safetensors"
    shutil.copy(find_model("nano_4step_lora"), lora)
    answer = CliRunner().invoke(
        app, ["generate", "a fox", "--lora", str(lora), "-o", str(folder / "out")]
    )
    assert answer.exit_code == 0, answer.output
    return Path(answer.stdout.strip()), lora


def test_replay_finds_a_lora_that_moved_by_its_hash_or_takes_it(
    run, drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    picture, lora = drawn
    beside = lora.with_name("b.safetensors")
    lora.rename(beside)
    answer = run("replay", picture, "-o", tmp_path)
    assert answer.exit_code == 0, answer.output
    assert f"{lora} is now {beside}" in answer.stderr
    away = tmp_path / "c.safetensors"
    beside.rename(away)
    answer = run("replay", picture, "-o", tmp_path / "again")
    assert_one_clean_line(answer, f"the LoRA {lora} is missing", "--lora")
    answer = run("replay", picture, "--lora", away, "-o", tmp_path / "again")
    assert answer.exit_code == 0, answer.output
    wrong = find_model("nano_2step_lora")
    answer = run("replay", picture, "--lora", wrong, "-o", tmp_path / "again")
    assert answer.exit_code == 1 and str(lora) in answer.stderr
    away.rename(lora)


def test_an_old_picture_s_lora_is_told_by_name_alone(
    run, drawn: tuple[Path, Path], tmp_path: Path
) -> None:
    picture, _ = drawn
    with Image.open(picture) as image:
        described = json.loads(image.info["twostep"])
        described.pop("lora_hashes")
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("twostep", json.dumps(described))
        image.save(tmp_path / "old.png", pnginfo=info)
    assert read_provenance(tmp_path / "old.png").lora_hashes == {}
    answer = run("replay", tmp_path / "old.png", "-o", tmp_path)
    assert answer.exit_code == 0, answer.output


@pytest.mark.slow
def test_ctrl_c_and_a_closed_pipe_end_quietly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twostep"]
    drawing = subprocess.Popen(
        [*command, "generate", "a fox", "--steps", "32", "-n", "64", "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in the background with SIGINT ignored, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    folder = tmp_path / "out"
    deadline = time.monotonic() + 240
    while not any(folder.glob("*")) and drawing.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    drawing.send_signal(signal.SIGINT)
    _, errors = drawing.communicate(timeout=60)
    assert drawing.returncode == 130 and "Traceback" not in errors, errors
    piped = subprocess.run(
        f"{' '.join(command)} recipes | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert piped.returncode in (0, 1, 141) and piped.stderr == "", piped.stderr
