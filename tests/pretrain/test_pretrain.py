"""Pretraining of every part on the committed sample: losses fall, a resumed run equals an
uninterrupted one.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from twostep.cli import app
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.descent import DescentSettings
from twostep.pretrain.drawings import EmojiSet
from twostep.pretrain.latents import cache_latents
from twostep.pretrain.model import PIXELS, random_bundle
from twostep.pretrain.parts import train_part
from twostep.pretrain.teacher import TeacherSettings, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.pretrain.vae import VaeSettings, train_vae
from twostep.training.loop import TrainingError, learning_rate_factor
from twostep.training.run_folder import RunFolder

SAMPLE = Path(__file__).parent / "emoji_sample.safetensors"
Weights = dict[str, torch.Tensor]
Run = Callable[..., Weights]


def loop(**changes: Any) -> dict[str, Any]:
    values = {
        "iterations": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_iterations": 1,
        "precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
        "ema_decay": 0.5,
    }
    return values | changes


def run_vae(
    emoji: EmojiSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    settings = VaeSettings.model_validate({"num_pictures": 8, "loop": loop(**changes)})
    return train_vae(
        emoji, settings, RunFolder(folder, settings), on_iteration=on_iteration
    ).vae.state_dict()


def run_text(
    emoji: EmojiSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    settings = TextSettings.model_validate({"loop": loop(**changes)})
    text = train_text(emoji, settings, RunFolder(folder, settings), on_iteration=on_iteration)
    return text.encoders[1].state_dict()


def run_teacher(
    emoji: EmojiSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    random = random_bundle()
    settings = TeacherSettings.model_validate({"loop": loop(**changes)})
    latents = cache_latents(emoji, random.codec, variants=1)
    folder = RunFolder(folder, settings)
    return train_teacher(
        latents, random.text, settings, folder, on_iteration=on_iteration
    ).network.state_dict()


RUNS = pytest.mark.parametrize("run", [run_vae, run_text, run_teacher])


@RUNS
def test_the_loss_falls(run: Run, emoji: EmojiSet, tmp_path: Path) -> None:
    losses: list[float] = []
    run(
        emoji,
        tmp_path,
        lambda i, figures: losses.append(figures["loss"]),
        iterations=40,
        batch_size=16,
    )
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@RUNS
def test_interrupted_and_resumed_equals_uninterrupted(
    run: Run, emoji: EmojiSet, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    def nothing(iteration: int, figures: dict[str, float]) -> None:
        return None

    whole = run(emoji, tmp_path / "whole", nothing)
    with pytest.raises(Killed):
        run(emoji, tmp_path / "cut", die)
    resumed = run(emoji, tmp_path / "cut", nothing)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_loss_that_explodes_is_told_with_what_to_do(emoji: EmojiSet, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"vae loss is nan at iteration \d+.*lower learning_rate"
    ):
        run_vae(emoji, tmp_path, lambda i, figures: None, learning_rate=1e30)


def test_the_rate_warms_up_stays_and_decays() -> None:
    settings = DescentSettings.model_validate(loop(iterations=1000, warmup_iterations=100))
    rates = [learning_rate_factor(i, settings) for i in range(1000)]
    assert rates[0] == 0.01
    assert rates[100] == rates[749] == 1.0
    assert rates[-1] < 0.03
    assert all(after <= before for before, after in pairwise(rates[750:]))


def test_the_three_recipes_make_a_model_that_loads(emoji: EmojiSet, tmp_path: Path) -> None:
    def make(name: str, out: Path, *overrides: str) -> None:
        quick = ["loop.iterations=2", "loop.batch_size=4", "loop.precision=fp32"]
        train_part(name, emoji, out, device=torch.device("cpu"), overrides=[*quick, *overrides])

    vae, text, teacher = (tmp_path / name for name in ("vae", "text", "teacher"))
    make("nano-vae", vae, "num_pictures=8")
    make("nano-text", text)
    where = [f"autoencoder={vae / 'model'}", f"text_encoders={text / 'model'}"]
    make("nano-teacher", teacher, "variants=1", *where)
    bundle = load_bundle(teacher / "model")
    assert bundle.contract.recipe == "nano-teacher"
    request = Request("a fox", steps=2)
    assert generate(bundle, request).images[0].size == (PIXELS, PIXELS)


def test_a_part_that_is_none_is_told() -> None:
    arguments = ["pretrain", "nano-unet", "--out", "x", "--drawings", str(SAMPLE)]
    answer = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert answer.exit_code == 1
    assert "nano-vae, nano-text, nano-teacher" in answer.stderr
