"""What every run of distillation begins with: its device, its processes, a note of both."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from importlib import metadata

import torch

from twostep.distill.recipe import RunRecipe, TrainedStage
from twostep.training.device import find_device, has_own_memory
from twostep.training.processes import world
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder
from twostep.training.trackers import track

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def begin_run(
    recipe: RunRecipe,
    folder: RunFolder,
    *,
    version: str,
    shard: bool = False,
) -> torch.device:
    """Return a recipe's device; log on what the run runs, and begin to track it.

    Args:
        recipe: of the run.
        folder: takes the log.
        version: of this package.
        shard: whether networks are spread over processes.

    Raises:
        RecipeError: the processes that there are cannot share a batch alike.
    """
    stages = recipe.trained_stages
    device = find_device(recipe.device)
    track(folder, recipe.trackers)
    _check_processes(stages, device, shard=shard)
    if any(stage.offload for stage in stages) and not has_own_memory(device):
        warnings.warn(
            f"offload does nothing on {device.type}, which has no memory beside the main memory",
            stacklevel=3,
        )
    _log_environment(folder, device, version)
    return device


def _check_processes(stages: Sequence[TrainedStage], device: torch.device, *, shard: bool) -> None:
    """Refuse what several processes cannot share alike: RecipeError."""
    count = world().size
    if count > 1 and device.index is not None:
        raise RecipeError(
            f'device "{device}" is one for {count} processes; "{device.type}" gives each its own.'
        )
    if shard and count == 1:
        raise RecipeError(
            "shard spreads networks over processes, and this is one: start several, or "
            "-o shard=false."
        )
    check_shares(stages, count)


def check_shares(stages: Sequence[TrainedStage], count: int) -> None:
    """Refuse batches that so many processes cannot share alike: RecipeError."""
    for stage in stages:
        if stage.batch_size % count:
            raise RecipeError(
                f"stage {stage.name} has batch_size {stage.batch_size}, which {count} processes "
                "cannot share alike. batch_size counts the examples of all of them: give a "
                f"multiple of {count}, or start fewer processes."
            )


def _log_environment(folder: RunFolder, device: torch.device, version: str) -> None:
    """Log on what the run runs, to be read beside its times and figures."""
    on_gpu = device.type == "cuda"
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    folder.log(
        part="environment",
        machine=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        device=device.type,
        processes=world().size,
        **versions,
        python=platform.python_version(),
        twostep=version,
    )
