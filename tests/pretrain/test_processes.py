"""Two processes that pretrain a part together learn what one does alone."""

import json
from pathlib import Path

import pytest

from ..conftest import SAMPLE
from ..distill.launching import launch

TRAIN = """
import json
from pathlib import Path
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.latents import cache_latents
from twostep.pretrain.model import random_bundle
from twostep.pretrain.sizes import NANO
from twostep.pretrain.teacher import TeacherSettings, new_denoiser, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.training.processes import joined
from twostep.training.run_folder import RunFolder
import torch

out = Path({out!r})
drawings = load_drawings(Path({drawings!r}))
loop = {{"iterations": 4, "batch_size": 8, "learning_rate": 1e-4, "warmup_iterations": 1,
         "precision": "fp32", "ema_decay": 0.5, "checkpoint_every": 4, "log_every": 1}}
losses = {{"text": [], "teacher": []}}

def hear(part):
    return lambda done, figures: losses[part].append(figures["loss"])

with joined(torch.device("cpu")) as world:
    settings = TextSettings(device="cpu", loop=loop)
    text = train_text(drawings, settings, RunFolder(out / "text", settings),
                      on_iteration=hear("text"))
    settings = TeacherSettings(device="cpu", loop=loop)
    random = random_bundle()
    latents = cache_latents(drawings, random.codec, pixels=64, variants=1)
    train_teacher(new_denoiser(NANO, 0), latents, random.text, settings,
                  RunFolder(out / "teacher", settings), pixels=64, on_iteration=hear("teacher"))
    if world.is_first:
        (out / "losses.json").write_text(json.dumps(losses))
"""


def losses(folder: Path, count: int) -> dict[str, list[float]]:
    code = TRAIN.format(out=str(folder), drawings=str(SAMPLE))
    assert launch(code, folder, count=count).finish() == [0] * count
    found: dict[str, list[float]] = json.loads((folder / "losses.json").read_text())
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone = losses(tmp_path / "alone", 1)
    together = losses(tmp_path / "together", 2)
    for part, expected in alone.items():
        assert len(expected) == 4
        assert expected[0] != expected[-1]
        assert together[part] == pytest.approx(expected, rel=1e-4), part
