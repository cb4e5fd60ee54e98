"""Where a model lies: a built-in name, a folder as diffusers saves it, a .safetensors file, or a
hub id.

ByteDance's SDXL-Lightning files are known by name: `sdxl_lightning_4step.safetensors` is a whole
checkpoint, `.._unet` the UNet alone, `.._lora` a LoRA for any SDXL base, and so for 8 and 2 steps.
For 1 step they end with `_x0`, for they predict x0, and there is no LoRA.
"""

import json
import re
from pathlib import Path
from typing import Any

from twostep.contract import ContractError
from twostep.errors import TwostepError

WEIGHTS = Path(__file__).parent.parent / "weights"
CONTRACT_FILE = "twostep.json"
INDEX_FILE = "model_index.json"
CONFIGS = ("*.json", "*.txt")
"""What of a hub repository is no weights: configs and tokenizers."""

LIGHTNING = ("ByteDance/SDXL-Lightning", "sdxl-lightning")
"""ByteDance's repository, and what it is called here."""

UNETS = {
    steps: f"sdxl_lightning_{steps}step_unet{'_x0' if steps == 1 else ''}.safetensors"
    for steps in (8, 4, 2, 1)
}
NAMED = re.compile(r"sdxl_lightning_(\d+)step(|_unet|_lora)(|_x0)\.safetensors")


class ModelError(TwostepError):
    """Something that is no model, is damaged, or has no student of that many steps."""


def find_model(
    model: str | Path, *, steps: int | None = None, only: tuple[str, ...] | None = None
) -> Path:
    """Return the folder or .safetensors file of a model; a hub id, or what of it is asked for, is
    fetched or cached.

    `steps` picks the file of ByteDance's repository. Raises `ModelError` with what was found
    instead.
    """
    built_in = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONTRACT_FILE}"))
    students = {path.stem: path for path in WEIGHTS.glob("*/students/*.safetensors")}
    path = WEIGHTS / str(model) if str(model) in built_in else students.get(str(model), Path(model))
    if path.is_file() or any((path / name).is_file() for name in (CONTRACT_FILE, INDEX_FILE)):
        return path
    if not path.exists() and (name := official_file(model, steps)) is not None:
        return fetch(LIGHTNING[0], file=name)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return fetch(str(model), only=only or (*CONFIGS, "*/*.safetensors"))
    neither = f"has neither {CONTRACT_FILE} nor {INDEX_FILE}, so it is no model folder"
    names = ", ".join([*built_in, *sorted(students)])
    expected = (
        f"a model folder, a .safetensors file, a hub id (owner/name) or a built-in name ({names})"
    )
    raise ModelError(f"{path} {neither if path.is_dir() else 'does not exist'}. Give {expected}.")


def official_file(model: str | Path, steps: int | None = None) -> str | None:
    """Return the name of the official file that is meant, by itself or as the UNet of so many steps
    (2 if not said).
    """
    name = str(model).removeprefix(f"{LIGHTNING[0]}/").removesuffix(".safetensors") + ".safetensors"
    if str(model) in LIGHTNING:
        if steps not in (None, *UNETS):
            raise ContractError(
                f"{model} has students for {', '.join(map(str, UNETS))} steps; asked for {steps}."
            )
        return UNETS[steps or 2]
    return name if NAMED.fullmatch(name) else None


def weights_variant(folder: Path) -> str | None:
    """Return "fp16" where a part of a model has only such weights; ModelError where it has none but
    pickles.
    """
    # a cache half filled has dead links
    there = [path.name for path in folder.glob("*.safetensors") if path.exists()]
    if any(".fp16." not in name for name in there):
        return None
    if there:
        return "fp16"
    found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    advice = (
        "load them once with diffusers and call save_pretrained(folder, safe_serialization=True)"
    )
    problem = f"{folder} has no .safetensors weights (found: {found})"
    raise ModelError(f"{problem}. Pickled weights can run code, so they are not read: {advice}.")


def read_json(path: Path) -> dict[str, Any]:
    """Read a config; ModelError where it is missing or damaged."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} does not exist: that part of the model is missing. Fetch or train it."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch that model again.") from error
    return values


def fetch(
    hub_id: str,
    *,
    only: tuple[str, ...] = CONFIGS,
    file: str | None = None,
    holding: str = INDEX_FILE,
) -> Path:
    """Return the local copy of what matches of a hub repository, or of a file of it; ModelError if
    not to be had.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if file is not None:
            return Path(hf_hub_download(hub_id, file))
        found = Path(snapshot_download(hub_id, allow_patterns=list(only)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        problem = (
            f"is neither a folder here nor to be had from the hub ({str(error).splitlines()[0]})"
        )
        advice = "Check the name and the connection, or give the path of a model folder"
        raise ModelError(f"{hub_id} {problem}. {advice}.") from error
    if not (found / holding).is_file():
        raise ModelError(f"{hub_id} has no {holding}: it is no diffusers folder. Give one that is.")
    return found
