"""The committed sample of drawings, and a judge that has seen them for a few seconds."""

from pathlib import Path

import pytest
from train_judge import JudgeRecipe, train_judge

from examples.nano.descent import DescentSettings
from examples.nano.drawings import EmojiSet, load_emoji
from examples.nano.judge import Judge, load_judge

SAMPLE = Path(__file__).parent / "emoji_sample.safetensors"

QUICK = JudgeRecipe(
    name="quick",
    channels=(24, 48, 64),
    num_held_out=2,
    loop=DescentSettings(
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
def emoji() -> EmojiSet:
    return load_emoji(SAMPLE)


@pytest.fixture(scope="session")
def quick_run(emoji: EmojiSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short training."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    train_judge(QUICK, emoji, out)
    return out


@pytest.fixture(scope="session")
def quick_judge(quick_run: Path) -> Judge:
    return load_judge(quick_run / "judge.safetensors")


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The one that ships."""
    return load_judge()
