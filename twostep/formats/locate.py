"""Where a model lies: a built-in name, a folder as diffusers saves it, a .safetensors file, or the
hub.

Nothing here looks into a file of weights; see `checkpoint.resolve` for that.
"""

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from twostep.errors import TwostepError
from twostep.formats.lightning import LIGHTNING, official_file

WEIGHTS = Path(__file__).parent.parent / "weights"
"""The built-in models, a folder each."""

ENTRY_POINTS = "twostep.models"
"""The group of entry points by which installed packages declare models: a name, and the path of the
folder as an attribute of a module.
"""

CONTRACT_FILE = "twostep.json"
"""The sampling contract in a model folder that was written here."""

INDEX_FILE = "model_index.json"
"""The file that makes a folder a diffusers pipeline."""

CONFIGS = ("*.json", "*.txt")
"""Patterns for what is no weights in a hub repository: configs and tokenizers."""

SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
"""SDXL's repository on the hub."""

SDXL_CONFIGS = Path(__file__).parent / "sdxl"
"""The configs of SDXL's networks, so that nothing is fetched for files that have none."""

STABLE_AUDIO_OPEN = "stabilityai/stable-audio-open-1.0"
"""The repository of Stable Audio Open 1.0 on the hub."""

STABLE_AUDIO_CONFIGS = Path(__file__).parent / "stable_audio_open"
"""The configs of its networks, of which plans are made."""

STABLE_DIFFUSION_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""The repository of Stable Diffusion 1.5 on the hub."""

STABLE_DIFFUSION_15_CONFIGS = Path(__file__).parent / "stable_diffusion_15"
"""The configs of its networks."""

_PLANNED_BEFORE = {
    "models/animatediff-sd15": Path(__file__).parent / "animatediff_sd15",
    "models/animatediff-sdxl": Path(__file__).parent / "animatediff_sdxl",
}
"""Folders that recipes need and say how to make, and configs by which they are planned before."""

HUB = "hf:"
"""What may stand before a hub id, to say that it is no path."""

_HUB_ID = re.compile(r"(?!\.)[\w.-]+/(?!\.)[\w.-]+")
_FILE = re.compile(
    r"\.(safetensors|ckpt|pth?|bin|gguf|onnx|json|toml|png|jpe?g|webp|zip|tar)$", re.I
)
"""How names end that are those of files, and of no repository."""


class ModelError(TwostepError):
    """A model that does not exist, is damaged, is of another kind, or lacks such a student."""


class NoModelFolderError(ModelError):
    """A name that stands for no model as a whole; it may be that of one file all the same."""


def find_model(
    model: str | Path, *, steps: int | None = None, only: tuple[str, ...] | None = None
) -> Path:
    """Return the folder or .safetensors file of a model; hub repositories are fetched or cached.

    Arguments:
        model: a built-in name, a path, an official SDXL-Lightning name, or a hub id.
        steps: picks the file of ByteDance's repository; of no effect on other models.
        only: patterns of what to fetch of a hub repository; configs and weights by default. Those
            of SDXL, Stable Audio Open and Stable Diffusion 1.5 are here already.

    Raises ModelError if there is no such model, with what was found instead.
    """
    path = (_built_in_students() | _built_in_models()).get(str(model), Path(model))
    if _is_model(path):
        return path
    if not path.exists():
        installed = _installed_model(str(model)) or _installed_students().get(str(model))
        if installed is not None:
            return installed
        official = official_file(model, steps)
        if official is not None:
            return fetch(LIGHTNING[0], file=official)
        here = _configs_here(model) if only == CONFIGS else None
        if here is not None:
            return here
        repository = hub_id(model)
        if repository is not None:
            return fetch(repository, only=only or (*CONFIGS, "*/*.safetensors"))
    raise NoModelFolderError(_no_model(path))


def _configs_here(model: str | Path) -> Path | None:
    """Return the configs in the package by which a model is planned, None if there are none."""
    repositories = {
        SDXL_BASE: SDXL_CONFIGS,
        STABLE_AUDIO_OPEN: STABLE_AUDIO_CONFIGS,
        STABLE_DIFFUSION_15: STABLE_DIFFUSION_15_CONFIGS,
    }
    return _PLANNED_BEFORE.get(str(model)) or repositories.get(hub_id(model) or "")


def hub_id(name: str | Path) -> str | None:
    """Return the hub repository (owner/name) that a name means, None for a path.

    A path that does not exist must not be asked of the hub, where somebody else may have a model of
    that name. So these are paths: what is given as one, what begins with a dot, a tilde or a slash,
    what has the ending of a file, and what would lie in a folder that is here. `hf:` before a name
    says that it is meant for the hub all the same.
    """
    if isinstance(name, Path):
        return None
    is_marked = name.startswith(HUB)
    name = name.removeprefix(HUB)
    if not _HUB_ID.fullmatch(name):
        return None
    if is_marked:
        return name
    owner, _, _ = name.partition("/")
    return None if _FILE.search(name) or Path(owner).is_dir() else name


def _built_in_models() -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(WEIGHTS.glob(f"*/{CONTRACT_FILE}"))}


def _built_in_students() -> dict[str, Path]:
    return {path.stem: path for path in sorted(WEIGHTS.glob("*/students/*.safetensors"))}


def built_in_folder(name: str) -> Path | None:
    """Return the folder of a built-in or installed model, None if there is no such model."""
    return _built_in_models().get(name) or _installed_model(name)


def model_of_student(file: Path, base: str, *, part: str = CONTRACT_FILE) -> Path | None:
    """Return the folder of the model that a student's file belongs to, None if there is none.

    Arguments:
        file: which may lie in the folder `students` of its model, or among the snapshots of a run
            beside its `model`.
        base: the name of the model, which may be built in or installed.
        part: a file that the folder must have.
    """
    beside = file.parent.parent
    for folder in (beside, beside / "model", built_in_folder(base)):
        if folder is not None and (folder / part).is_file():
            return folder
    return None


def _installed_model(name: str) -> Path | None:
    """Return the folder of a model that an installed package declares."""
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return Path(entry.load())
    return None


def _installed_students() -> dict[str, Path]:
    """Return the files of the students of models that installed packages declare, by name."""
    folders = [Path(entry.load()) for entry in entry_points(group=ENTRY_POINTS)]
    files = [path for folder in folders for path in sorted(folder.glob("students/*.safetensors"))]
    return {path.stem: path for path in files}


def _is_model(path: Path) -> bool:
    if path.is_file():
        return True
    return any((path / name).is_file() for name in (CONTRACT_FILE, INDEX_FILE))


def _no_model(path: Path) -> str:
    """Explain that there is no model at a path."""
    problem = "does not exist"
    if path.is_dir():
        problem = f"has neither {CONTRACT_FILE} nor {INDEX_FILE}, so it is no model folder"
    elif _HUB_ID.fullmatch(str(path)) and path.parent.is_dir():
        problem += f" in the folder {path.parent} here (the hub's is {HUB}{path})"
    installed = [*sorted(entry_points(group=ENTRY_POINTS).names), *_installed_students()]
    names = ", ".join([*_built_in_models(), *_built_in_students(), *installed])
    return (
        f"{path} {problem}. Give a model folder, a .safetensors file, a hub id (owner/name) or a "
        f"built-in name ({names})."
    )


def weights_variant(folder: Path) -> str | None:
    """Return "fp16" if one part of a model has weights of that variant alone, else None.

    Raises ModelError if the folder has no safetensors weights at all.
    """
    # A hub cache that was half downloaded has links to files that do not exist.
    names = [path.name for path in folder.glob("*.safetensors") if path.exists()]
    if any(".fp16." not in name for name in names):
        return None
    if names:
        return "fp16"
    present = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise ModelError(
        f"{folder} has no .safetensors weights (found: {present}). Pickled weights can run code, "
        "so they are not read: load them once with diffusers and call "
        "save_pretrained(folder, safe_serialization=True)."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a config; raises ModelError if it is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} does not exist: that part of the model is missing. Fetch or train it."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch that model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} is damaged (no JSON object). Fetch that model again.")
    return values


def fetch(
    hub_id: str,
    *,
    only: tuple[str, ...] = CONFIGS,
    file: str | None = None,
    holding: str = INDEX_FILE,
) -> Path:
    """Return the local copy of a hub repository, fetched if it is not in the cache.

    Arguments:
        hub_id: the repository, as owner/name.
        only: patterns of the files that are wanted.
        file: one file that is wanted instead; its path is returned.
        holding: a file that the repository must have.

    Raises ModelError if it cannot be had, or does not hold what it must.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            return Path(hf_hub_download(hub_id, file))
        folder = Path(snapshot_download(hub_id, allow_patterns=list(only)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{hub_id} is neither a folder here nor to be had from the hub ({reason}). "
            "Check the name and the connection, or give the path of a model folder."
        ) from error
    if not (folder / holding).is_file():
        raise NoModelFolderError(
            f"{hub_id} has no {holding}: it is no diffusers folder. Give one that is."
        )
    return folder
