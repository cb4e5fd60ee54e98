"""TensorBoard and Weights & Biases beside `log.jsonl`, through accelerate's trackers; only where a
recipe names them.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from twostep.training.processes import world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder

Tracker = Literal["tensorboard", "wandb"]


def track(folder: RunFolder, names: Sequence[Tracker]) -> None:
    """Let trackers hear the figures that the folder logs; RecipeError for one that is not
    installed.

    TensorBoard's files go into `tensorboard` in the folder; W&B asks for its key as it always does.
    """
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f'trackers names "{name}", which is not installed: pip install {name}, or leave it out.'
            )
    if not names or not world().is_first:
        return
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    run = {"name": folder.path.name, "dir": str(folder.path)}
    trackers = [
        TensorBoardTracker(name, folder.path)
        if name == "tensorboard"
        else WandBTracker("twostep", **run)
        for name in names
    ]
    for tracker in trackers:
        tracker.start()

    def hear(values: dict[str, Any]) -> None:
        if "iteration" in values:
            figures = {
                f"{values['part']}/{key}": value
                for key, value in values.items()
                if isinstance(value, float)
            }
            for tracker in trackers:
                tracker.log(figures, step=values["iteration"])

    folder.hear = hear
