"""TensorBoard and Weights & Biases beside `log.jsonl`, only where a recipe names them.

Both are written through the trackers of accelerate.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from twostep.training.processes import world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder

Tracker = Literal["tensorboard", "wandb"]


def track(folder: RunFolder, names: Sequence[Tracker]) -> None:
    """Send the figures of every logged iteration to the named trackers.

    The files of TensorBoard go into `tensorboard` in the run folder. Weights & Biases asks for its
    key as it always does.

    Raises:
        RecipeError: a named tracker is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f'trackers names "{name}", which is not installed: pip install {name}, '
                "or leave it out."
            )
    if not names or not world().is_first:
        return
    trackers = [_start_tracker(name, folder) for name in names]

    def log_figures(values: dict[str, Any]) -> None:
        if "iteration" not in values:
            return
        figures = {
            f"{values['part']}/{key}": value
            for key, value in values.items()
            if isinstance(value, float)
        }
        for tracker in trackers:
            tracker.log(figures, step=values["iteration"])

    folder.on_log = log_figures


def _start_tracker(name: Tracker, folder: RunFolder) -> Any:
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        tracker = TensorBoardTracker(name, folder.path)
    else:
        tracker = WandBTracker("twostep", name=folder.path.name, dir=str(folder.path))
    tracker.start()
    return tracker
