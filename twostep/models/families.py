"""Model families: what knows how a kind of model lies on disk.

A family loads and saves bundles of its own backbone, codec and text encoders. SDXL is one of them;
others may live outside the package. The sampling contract names the family of a model, so that a
folder is loaded by the family that wrote it.

A family from outside is found if it was registered with `register_family`, or if an installed
package declares it as an entry point of the group `twostep.families`. Code may also name one as
"module:attribute". A contract may not: contracts come with files from strangers, and nothing that a
file says may import code.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from twostep.contract import Contract
from twostep.formats.checkpoint import Checkpoint
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.motion import MotionFamily
from twostep.models.sdxl import SdxlFamily

ENTRY_POINTS = "twostep.families"
"""The group of entry points by which installed packages declare families."""


@runtime_checkable
class Family(Protocol):
    """A kind of model: how it is loaded from disk and saved."""

    @property
    def name(self) -> str:
        """The name that contracts call the family by."""

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model, or its student of so many steps, frozen and in float32.

        With `outline`, weights may be left as they are initialised, and only configs are read.
        """

    def save(self, bundle: Bundle, folder: Path) -> None:
        """Write a model folder that `load` reads, with the contract in `CONTRACT_FILE`."""

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        """Write a student, or a LoRA if its contract has a rank, into its teacher's folder.

        `weights` are by the names of the backbone's module. Returns the file, which is
        `formats.checkpoint.student_path` and carries the contract in its metadata.
        """


@runtime_checkable
class LoadsToDraw(Protocol):
    """A family that has networks which can do no more than draw, and are there sooner."""

    def load_to_draw(self, checkpoint: Checkpoint, *, steps: int | None = None) -> Bundle:
        """Load a model as `load` does, with such networks."""


_FAMILIES: dict[str, Family] = {"sdxl": SdxlFamily(), "motion": MotionFamily()}

_BUILT_IN = {
    "nano-audio": "twostep.models.audio:AudioFamily",
    "stable-audio": "twostep.models.stable_audio:StableAudioFamily",
}
"""Further families of the package, which are imported when the first model names them."""


def register_family(family: Family) -> None:
    """Make a family known by its name; a later one of the same name takes its place."""
    _FAMILIES[family.name] = family


def find_family(name: str) -> Family:
    """Return a family by its name, or as "module:attribute".

    Raises ModelError if there is no such family.
    """
    module, _, attribute = name.partition(":")
    if attribute:
        return _imported(name, module, attribute)
    if name not in _FAMILIES and name in _BUILT_IN:
        register_family(find_family(_BUILT_IN[name]))
    if name not in _FAMILIES:
        for entry in entry_points(group=ENTRY_POINTS, name=name):
            register_family(_checked(name, entry.load()))
    if name not in _FAMILIES:
        raise ModelError(_unknown(name))
    return _FAMILIES[name]


def family_of(contract: Contract) -> Family:
    """Return the family that a contract names, without importing what it names.

    Raises ModelError if no such family is registered.
    """
    if ":" in contract.family:
        raise ModelError(f"{contract.name}: {_unknown(contract.family)}")
    return find_family(contract.family)


def _imported(name: str, module: str, attribute: str) -> Family:
    try:
        found = vars(import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        raise ModelError(
            f"There is no family {name!r} ({error}). Give a registered name, or module:attribute "
            "of a module that Python finds."
        ) from error
    return _checked(name, found)


def _checked(name: str, family: object) -> Family:
    """Return a family, made if a class was given; raises ModelError for anything else."""
    if isinstance(family, type):
        family = family()
    if not isinstance(family, Family):
        raise ModelError(
            f"{name} is {type(family).__name__}, which is no model family: expected name, load, "
            "save and save_student. See twostep.models.families.Family."
        )
    return family


def _unknown(name: str) -> str:
    known = ", ".join(_FAMILIES | _BUILT_IN)
    return (
        f"There is no model family {name!r}; there are {known}. Register it with "
        "twostep.models.families.register_family, or install the package that declares it "
        f"(entry point {ENTRY_POINTS})."
    )
