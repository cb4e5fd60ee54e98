"""From a bundle, or the weights of a student, to files."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from twostep.contract import Contract
from twostep.formats.folders import weights_folder
from twostep.models.bundle import Bundle
from twostep.models.families import family_of


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a model folder with its contract, as the model's family lays it out.

    It appears whole or not at all; in a folder that is there already, file by file. Raises
    WriteError where it cannot be written.
    """
    with weights_folder(folder) as partial:
        family_of(bundle.contract).save(bundle, partial)


def save_student(weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
    """Write a student's network or LoRA into its teacher's folder, the contract in the metadata.

    Returns the file.
    """
    return family_of(contract).save_student(weights, contract, folder)
