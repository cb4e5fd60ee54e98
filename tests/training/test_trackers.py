"""Trackers: what the log says of an iteration, they are told; what is not installed is named."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twostep.training.loop import LoopSettings
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder
from twostep.training.trackers import track

SETTINGS = LoopSettings(iterations=1, batch_size=1, learning_rate=1.0)


def test_tensorboard_is_told_every_figure_of_an_iteration(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    track(folder, ("tensorboard",))
    folder.log(part="environment", machine="a")
    folder.log(part="8-mse", iteration=5, loss=0.5)
    folder.log(part="8-mse", iteration=10, loss=0.25, trouble="too red")
    read = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["8-mse/loss"]
    assert [(event.step, event.value) for event in read.Scalars("8-mse/loss")] == [
        (5, 0.5),
        (10, 0.25),
    ]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed here")
def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pip install wandb"):
        track(RunFolder(tmp_path / "run", SETTINGS), ("wandb",))
