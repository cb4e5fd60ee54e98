"""A model that has been located and looked at, and is passed on to whatever loads it.

`resolve` is the one entrance: a name goes in, and a `Checkpoint` comes out that knows where the
model lies, what it is, and how it is to be sampled. Every header is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from twostep.contract import Contract, student_name
from twostep.formats.contracts import (
    carried_contract,
    folder_contract,
    goes_on_a_student,
    official_contract,
    single_file_contract,
)
from twostep.formats.header import Header, read_header
from twostep.formats.identify import LORAS, Kind, kind_of
from twostep.formats.lightning import LIGHTNING, UNETS
from twostep.formats.locate import ModelError, NoModelFolderError, find_model
from twostep.formats.lora_locate import find_lora_file, may_be_one_file
from twostep.formats.single_header import is_whole

FOLDER = Kind("a folder")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model folder or a .safetensors file, located and identified; no weights are loaded.

    `name` is what it was asked for by. A folder has no header; the files in it have. `known` are
    files whose headers have been read already, so that a folder that holds them does not read them
    again.
    """

    name: str
    path: Path
    header: Header | None
    kind: Kind
    known: tuple[Checkpoint, ...] = field(default=(), repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder, not one file."""
        return self.header is None

    @property
    def is_lora(self) -> bool:
        """Whether the model is the file of a LoRA, or of a relative of it."""
        return self.kind.what in LORAS

    @property
    def is_whole(self) -> bool:
        """Whether the model is one file with everything in it, the autoencoder too."""
        return self.header is not None and is_whole(self.header)

    @property
    def file(self) -> Header:
        """The header of a file; raises ModelError for a folder."""
        if self.header is None:
            raise ModelError(f"{self.path} is a model folder. Give one .safetensors file.")
        return self.header

    @cached_property
    def carried(self) -> Contract | None:
        """The contract that a file carries, or that of an official file; None without either.

        Raises ModelError or ContractError for a contract that is damaged or does not fit.
        """
        return None if self.header is None else carried_contract(self.header)

    @cached_property
    def contracts(self) -> tuple[Contract, ...]:
        """The contracts of everything that can be loaded from here.

        Of a folder, the teacher's contract comes first, then those of the students by falling
        steps; a file has one. Raises ModelError for what is neither an SDXL model nor carries a
        contract.
        """
        if self.header is not None:
            return (self.carried or single_file_contract(self.header),)
        students = [student.contract for student in self.students.values()]
        students.sort(key=lambda contract: -contract.steps)
        return (folder_contract(self.path), *students)

    @property
    def contract(self) -> Contract:
        """The contract of the model itself: of a folder, the teacher's."""
        return self.contracts[0]

    def contract_for(self, steps: int | None) -> Contract:
        """Return the contract of the student of so many steps; None means the model itself.

        So does any number of steps of a model that has no students. Raises ModelError with the
        steps there are.
        """
        if steps is None or self.takes_any_steps:
            return self.contract
        for contract in self.contracts:
            if contract.steps == steps:
                return contract
        offered = ", ".join(str(contract.steps) for contract in self.contracts)
        raise ModelError(
            f"{self.name} has nothing for {steps} steps; there are {offered}. A student draws in "
            "the steps that it was trained for, and in no others: load the one for these."
        )

    @property
    def takes_any_steps(self) -> bool:
        """Whether the model is a teacher without students, so that no student has to be picked."""
        return len(self.contracts) == 1 and self.contract.role == "teacher"

    @cached_property
    def students(self) -> dict[int, Checkpoint]:
        """The students in a model folder, by their steps: LoRAs where there is no whole one."""
        whole = self._student_files("unet")
        # A LoRA beside a whole student of its name is of the same steps, and need not be read.
        names = {student.path.name.replace("_unet.", "_lora.") for student in whole}
        loras = _by_steps(self._student_files("lora", without=names))
        return loras | {_contract_of(student).steps: student for student in whole}

    @cached_property
    def student_loras(self) -> dict[int, Checkpoint]:
        """The LoRAs in a model folder that make students, by the steps of these."""
        return _by_steps(self._student_files("lora"))

    def _student_files(self, kind: str, *, without: Collection[str] = ()) -> list[Checkpoint]:
        """Look at the files of one kind in the folder `students`, but for those of some names."""
        if not self.is_folder:
            return []
        known = {file.path.resolve(): file for file in self.known}
        files = []
        for path in sorted(self.path.glob(f"students/*_{kind}.safetensors")):
            if path.name not in without:
                files.append(known.get(path.resolve()) or _look_at_file(str(path), path))
        return files


def resolve(
    model: str | Path | Checkpoint,
    *,
    steps: int | None = None,
    only: tuple[str, ...] | None = None,
) -> Checkpoint:
    """Locate a model or a LoRA and read its header.

    Arguments:
        model: a built-in name, a path, an official name, or a hub id (`owner/repo`, or
            `owner/repo/file.safetensors`), which is fetched if it is not in the cache. A folder or
            repository that is no model may hold one file. A checkpoint is returned as it is.
        steps: picks the file of ByteDance's repository; of no effect on other models.
        only: patterns of what to fetch of a hub repository; configs and weights by default.

    Raises ModelError if there is no such model, or its file is damaged or no safetensors file.
    """
    if isinstance(model, Checkpoint):
        return model
    try:
        path = find_model(model, steps=steps, only=only)
    except NoModelFolderError:
        if not may_be_one_file(model):
            raise
        path = find_lora_file(str(model))
    if path.is_file():
        return _look_at_file(str(model), path)
    return look_at_folder(path, name=str(model))


def look_at_folder(
    path: Path, *, name: str | None = None, known: tuple[Checkpoint, ...] = ()
) -> Checkpoint:
    """Return the model folder at a path.

    Arguments:
        path: the folder; it is taken as it is, even if a built-in model has that name.
        name: what it was asked for by; the path by default.
        known: files in the folder whose headers have been read already.
    """
    return Checkpoint(name or str(path), path, header=None, kind=FOLDER, known=known)


def read_contracts(model: str | Path | Checkpoint) -> list[Contract]:
    """Return the contracts of a model: the teacher's first, then the students' by falling steps.

    ByteDance's repository is known by heart, so nothing is fetched for it. Raises ModelError as
    `Checkpoint.contracts`.
    """
    if not isinstance(model, Checkpoint) and str(model) in LIGHTNING:
        contracts = [official_contract(name) for name in UNETS.values()]
        return [contract for contract in contracts if contract is not None]
    return list(resolve(model).contracts)


def student_path(contract: Contract, folder: Path) -> Path:
    """Return where the student of a contract lies in the model folder of its teacher."""
    kind = "unet" if contract.lora_rank is None else "lora"
    base = contract.name.removesuffix(student_name("", contract.steps))
    return folder / "students" / f"{base}_{contract.steps}step_{kind}.safetensors"


def _look_at_file(name: str, path: Path) -> Checkpoint:
    header = read_header(path)
    return Checkpoint(name, path, header, kind_of(header))


def _by_steps(loras: Iterable[Checkpoint]) -> dict[int, Checkpoint]:
    """Return those LoRAs that make students, by the steps of these."""
    contracts = [(_contract_of(lora), lora) for lora in loras]
    return {contract.steps: lora for contract, lora in contracts if not goes_on_a_student(contract)}


def _contract_of(student: Checkpoint) -> Contract:
    """Return the contract that a student's file must carry."""
    if student.carried is None:
        # The error says which metadata there is instead.
        return Contract.from_metadata(student.file.metadata)
    return student.carried
