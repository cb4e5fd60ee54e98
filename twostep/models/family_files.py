"""What families of models have in common that keep each model in a folder of their own files."""

from pathlib import Path
from typing import TypeVar

from twostep.contract import Contract
from twostep.files import write_atomically
from twostep.formats.checkpoint import Checkpoint, look_at_folder
from twostep.formats.locate import ModelError, model_of_student

PartT = TypeVar("PartT")


def folder_of(checkpoint: Checkpoint, contract: Contract, *, part: str, network: str) -> Checkpoint:
    """Return the folder of a model, of a student's file the one that it lies in.

    Arguments:
        checkpoint: a model folder, or a student's file.
        contract: of that model or student.
        part: a file that the folder of the model must have.
        network: what a student's file holds, in a word.

    Raises ModelError if the file does not lie in a model, and its model is not built in.
    """
    if checkpoint.is_folder:
        return checkpoint
    path = model_of_student(checkpoint.path, contract.base, part=part)
    if path is not None:
        return look_at_folder(path, known=(checkpoint,))
    raise ModelError(
        f"{checkpoint.path} holds only the {network} of a student of {contract.base}. Put it into "
        "the folder `students` of that model."
    )


def expected_part(part: object, kind: type[PartT], name: str, *, family: str) -> PartT:
    """Return a part of a bundle; ModelError if it is not of the kind that the family has.

    Arguments:
        part: of the bundle.
        kind: what it must be.
        name: of the model.
        family: what its models are called, in the plural.
    """
    if not isinstance(part, kind):
        raise ModelError(
            f"{name} has {type(part).__name__} where {family} have {kind.__name__}. Save it with "
            "its own family."
        )
    return part


def write_file(path: Path, data: bytes) -> None:
    """Write a file of a model, which appears whole or not at all."""
    with write_atomically(path) as file:
        file.write(data)
