"""A judge that has seen the sample of drawings for a few seconds."""

from pathlib import Path
from typing import Any

import pytest

from twostep.evaluate.judge import Judge, load_judge
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.judge import JudgeSettings, train_judge
from twostep.pretrain.loop import NetworkLoopSettings

QUICK = JudgeSettings(
    name="quick",
    channels=(24, 48, 64),
    num_held_out=2,
    loop=NetworkLoopSettings(
        iterations=120,
        batch_size=32,
        learning_rate=5e-3,
        warmup_iterations=10,
        decay_share=1.0,
        ema_decay=0.8,
        checkpoint_every=50,
        log_every=20,
    ),
)


@pytest.fixture(scope="session")
def quick_run(emoji: DrawingSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short training."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    train_judge(QUICK, emoji, out)
    return out


@pytest.fixture(scope="session")
def quick_judge(quick_run: Path) -> Judge:
    return load_judge(quick_run / "judge.safetensors")


def tiny_loop(**changes: Any) -> dict[str, Any]:
    """Settings of a loop of a few iterations."""
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
