"""TensorBoard and Weights & Biases beside `log.jsonl`, only where a recipe names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from twostep.files import reporting_write_errors
from twostep.training.processes import world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder

Tracker = Literal["tensorboard", "wandb"]

Send = Callable[[str, int, dict[str, float], Path | None], None]
"""Sends what was logged of an iteration: the part, the iteration, its figures by name, and the
picture that was drawn after it, if there is one.
"""


def track(folder: RunFolder, names: Sequence[Tracker]) -> None:
    """Send every logged figure, and the pictures of checkpoints, to the named trackers.

    The files of TensorBoard go into `tensorboard` in the run folder. Weights & Biases asks for its
    key as it always does; with WANDB_MODE=offline its files stay in `wandb` there. A run that is
    resumed goes on in the same place.

    Raises:
        RecipeError: a named tracker is not installed, or cannot start.
        WriteError: its files cannot be written; also later, when something is logged.
    """
    for name in names:
        if not _is_installed(name):
            raise RecipeError(
                f'trackers names "{name}", which is not installed: pip install {name}, '
                "or leave it out."
            )
    if not names or not world().is_first:
        return
    senders = []
    for name in names:
        with reporting_write_errors(folder.path / name):
            senders.append(_STARTERS[name](folder))

    def send(values: dict[str, Any]) -> None:
        if "iteration" not in values:
            return
        figures = {key: value for key, value in values.items() if isinstance(value, float)}
        picture = folder.path / values["picture"] if "picture" in values else None
        for name, sender in zip(names, senders, strict=True):
            with reporting_write_errors(folder.path / name):
                sender(values["part"], values["iteration"], figures, picture)

    folder.listeners.append(send)


def _is_installed(name: str) -> bool:
    """Return whether a package can be imported; a mere folder of that name is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _start_tensorboard(folder: RunFolder) -> Send:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder.path / "tensorboard"))

    def send(part: str, iteration: int, figures: dict[str, float], picture: Path | None) -> None:
        for key, value in figures.items():
            writer.add_scalar(f"{part}/{key}", value, iteration)
        if picture is not None:
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            writer.add_image(f"{part}/samples", pixels, iteration, dataformats="HWC")
        writer.flush()

    return send


def _start_wandb(folder: RunFolder) -> Send:
    import wandb

    run_id = folder.remembered("wandb", uuid4().hex[:8])
    try:
        run: Any = wandb.init(
            project="twostep",
            name=folder.path.resolve().name,
            dir=str(folder.path),
            id=run_id,
            resume="allow",
        )
    except Exception as error:
        # Whatever keeps it from starting, a training of days should not begin without it unheard.
        raise RecipeError(
            f"Weights & Biases cannot start ({error}). `wandb login` once, set WANDB_MODE=offline, "
            'or leave "wandb" out of trackers.'
        ) from error
    known: set[str] = set()

    def send(part: str, iteration: int, figures: dict[str, float], picture: Path | None) -> None:
        axis = f"{part}/iteration"
        if part not in known:
            # Each part counts its own iterations; by one common axis, which may only rise, all
            # but the first part would be dropped.
            run.define_metric(axis)
            run.define_metric(f"{part}/*", step_metric=axis)
            known.add(part)
        values: dict[str, Any] = {f"{part}/{key}": value for key, value in figures.items()}
        if picture is not None:
            values[f"{part}/samples"] = wandb.Image(str(picture))
        run.log({axis: iteration, **values})

    return send


_STARTERS: dict[str, Callable[[RunFolder], Send]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
}
