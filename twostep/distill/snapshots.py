"""Snapshots of a run: its student every so many iterations, as a file that can be used at once.

They lie in `snapshots/` of the run folder, in fp16 and with the contract of the finished student.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostep.contract import Contract
from twostep.distill.roles import file_weights
from twostep.export.card import Card
from twostep.export.writing import export
from twostep.files import folder_atomically
from twostep.formats import ModelError, resolve
from twostep.formats.single_file import FolderFiles, has_names_for
from twostep.models.saving import save_student
from twostep.models.sdxl import base_folder, is_sdxl
from twostep.networks.denoiser import Denoiser
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder
from twostep.training.shards import gathered

_FOLDER = "snapshots"
_NAME = re.compile(r"(?P<stage>.+)-(?P<iteration>\d{6,})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A student as it was at one moment of a run.

    Args:
        stage: the name of the stage that trained it.
        iteration: how many of the stage's iterations were done.
        path: of the file.
    """

    stage: str
    iteration: int
    path: Path

    @property
    def name(self) -> str:
        """The name by which one is asked for exactly, as in "4-regression:1000"."""
        return f"{self.stage}:{self.iteration}"


def snapshot_path(run: Path, stage: str, iteration: int) -> Path:
    """Return where the snapshot of a moment lies in a run's folder."""
    return run / _FOLDER / f"{stage}-{iteration:06d}.safetensors"


def save_snapshot(
    student: Denoiser, contract: Contract, folder: RunFolder, stage: str, iteration: int
) -> None:
    """Write the student as it is now; of several processes all must call it.

    Args:
        student: whose network, or LoRA, is written.
        contract: that of the stage's student.
        folder: of the run.
        stage: the stage's name.
        iteration: how many iterations are done.

    Raises:
        WriteError: the file cannot be written.
    """
    weights = gathered(file_weights(student))
    if not world().is_first:
        return
    path = snapshot_path(folder.path, stage, iteration)
    with folder_atomically(path.parent) as partial:
        # A family chooses the names of its files itself, which are those of finished students.
        named = partial / "named"
        save_student(weights, contract, named).replace(partial / path.name)
        shutil.rmtree(named)
    folder.log(part=stage, iteration=iteration, snapshot=f"{_FOLDER}/{path.name}")


def has_snapshot(folder: RunFolder, stage: str, iteration: int) -> bool:
    """Tell whether a run has written the snapshot of a moment, and said so in its log."""
    path = snapshot_path(folder.path, stage, iteration)
    return path.exists() and folder.has_logged(part=stage, snapshot=f"{_FOLDER}/{path.name}")


def snapshots_of(run: Path) -> list[Snapshot]:
    """Return the snapshots of a run, by stages in the order of their names and by iterations."""
    found = []
    for path in (run / _FOLDER).glob("*.safetensors"):
        if match := _NAME.fullmatch(path.name):
            found.append(Snapshot(match["stage"], int(match["iteration"]), path))
    return sorted(found, key=lambda snapshot: (snapshot.stage, snapshot.iteration))


def find_snapshot(run: Path, at: str) -> Snapshot:
    """Return the snapshot that is asked for.

    Args:
        run: the folder of the run.
        at: a number of iterations, or a stage and that number, as "4-regression:1000".

    Raises:
        ModelError: there is none, or several stages have one; the message lists what there is.
    """
    if not (run / "run.toml").is_file():
        raise ModelError(f"{run} is no folder of `twostep distill`; --at is for such a folder.")
    present = snapshots_of(run)
    if not present:
        raise ModelError(
            f"{run} has no snapshots. Set snapshot_every in the recipe's [defaults] or in a stage; "
            "a run that is under way takes it up when it is called again."
        )
    stage, _, number = at.rpartition(":")
    if not number.isdecimal():
        raise ModelError(
            f"--at is {at!r}; expected a number of iterations, as 1000, or a stage with it, as "
            f"{present[-1].name}."
        )
    matching = [
        snapshot
        for snapshot in present
        if snapshot.iteration == int(number) and stage in ("", snapshot.stage)
    ]
    if not matching:
        raise ModelError(f"{run} has no snapshot at {at}; there are {_listed(present)}.")
    if len(matching) > 1:
        names = ", ".join(snapshot.name for snapshot in matching)
        raise ModelError(f"{run} has several snapshots at {at}: say --at with one of {names}.")
    return matching[0]


def export_snapshot(
    run: Path,
    at: str,
    *,
    to: str | None = None,
    out: Path | None = None,
    base: str | None = None,
    loras: tuple[str, ...] = (),
    card: Card | None = None,
) -> list[Path]:
    """Write a snapshot in the forms that other programs load.

    Args:
        run: the folder of the run.
        at: which snapshot, as for `find_snapshot`.
        to: one of `export.writing.TARGETS`; by default the usual ones of what it is.
        out: where to: of one target as for `export`, otherwise a folder for all of them;
            `exports/STAGE-ITERATION` in the run's folder by default.
        base: a model with the layers of a LoRA, where its contract does not say it.
        loras: LoRAs to merge in.
        card: what the card shows beside the contract.

    Returns:
        What was written.

    Raises:
        ModelError: there is no such snapshot or no such export.
        WriteError: something cannot be written.
    """
    snapshot = find_snapshot(run, at)
    contract = resolve(snapshot.path).contract
    targets = _targets(snapshot, contract) if to is None else (to,)
    if to is not None and out is not None:
        return [export(snapshot.path, to, out, base=base, loras=loras, card=card)]
    folder = out or run / "exports" / snapshot.path.stem
    written = []
    for target in targets:
        name = contract.name if target == "diffusers" else f"{contract.name}_{target}.safetensors"
        path = folder / name
        written.append(export(snapshot.path, target, path, base=base, loras=loras, card=card))
    return written


def _listed(snapshots: Sequence[Snapshot]) -> str:
    """Return stages with their iterations, in words."""
    by_stage: dict[str, list[str]] = {}
    for snapshot in snapshots:
        by_stage.setdefault(snapshot.stage, []).append(str(snapshot.iteration))
    return "; ".join(f"{', '.join(each)} of {stage}" for stage, each in by_stage.items())


def _targets(snapshot: Snapshot, contract: Contract) -> Sequence[str]:
    """Return the usual exports of a snapshot: its folder where no single file can hold it whole."""
    targets = usual_targets(contract)
    if "comfyui" in targets:
        config = FolderFiles(base_folder(snapshot.path, contract)).config("vae")
        if not has_names_for(config):
            return ("diffusers", "unet")
    return targets


def usual_targets(contract: Contract) -> Sequence[str]:
    """Return the exports that are made of a student where none was named.

    A LoRA is written for ComfyUI and A1111 and for diffusers, a network for ComfyUI and as a UNet
    alone. What these have no words for, as another family, becomes a folder.
    """
    has_times = bool(contract.sampling_times)
    if not is_sdxl(contract) or contract.prediction_type == "flow":
        return ("diffusers",)
    if contract.lora_rank is not None:
        return ("lora-peft",) if has_times else ("lora-kohya", "lora-peft")
    return ("diffusers",) if has_times else ("comfyui", "unet")
