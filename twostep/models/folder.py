"""Where a model lies and what it says of itself, found without loading any weights.

A model is a built-in name, a folder as diffusers saves it, a student's .safetensors, or a hub id. Folders of ours carry
a contract in `twostep.json`; for any other SDXL folder one is derived from its configs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from twostep.contract import Contract, ContractError, PredictionType
from twostep.errors import TwostepError
from twostep.models.sizes import sizes_around

WEIGHTS = Path(__file__).parent.parent / "weights"
CONTRACT_FILE = "twostep.json"
INDEX_FILE = "model_index.json"
PREDICTION_TYPES: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
DEFAULT_STEPS, DEFAULT_GUIDANCE = 32, 6.0
"""For a teacher that says nothing of itself: what section 3.6 of arXiv 2402.13929 used on SDXL."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.onnx*", "*.xml")


class ModelError(TwostepError):
    """Something that is no model, is damaged, or has no student of that many steps."""


def find_model(model: str | Path) -> Path:
    """Return the folder or .safetensors file of a model; a hub id is fetched, or taken from the cache when offline.

    Raises `ModelError` with what was found instead.
    """
    built_in = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONTRACT_FILE}"))
    path = WEIGHTS / str(model) if str(model) in built_in else Path(model)
    if path.is_file() or any((path / name).is_file() for name in (CONTRACT_FILE, INDEX_FILE)):
        return path
    if not path.exists() and _HUB_ID.fullmatch(str(model)):
        return _fetch(str(model))
    problem = f"has neither {CONTRACT_FILE} nor {INDEX_FILE}, so it is no model folder"
    raise ModelError(
        f"{path} {problem if path.is_dir() else 'does not exist'}. Give a model folder, a .safetensors file, "
        f"a hub id (owner/name) or a built-in name ({', '.join(built_in) or 'none'})."
    )


def read_contracts(model: str | Path) -> list[Contract]:
    """Read the contracts of a model: the teacher's first, then the students' by falling steps; ModelError."""
    path = find_model(model)
    if path.is_file():
        return [file_contract(path)]
    students = [file_contract(file) for file in student_files(path).values()]
    return [_folder_contract(path), *sorted(students, key=lambda contract: -contract.steps)]


def student_files(folder: Path) -> dict[int, Path]:
    """Return the UNets of the students in a model folder by their steps."""
    return {file_contract(file).steps: file for file in sorted(folder.glob("students/*_unet.safetensors"))}


def file_contract(path: Path) -> Contract:
    """Read the contract in a student's file."""
    try:
        with safe_open(path, "pt") as file:
            return Contract.from_metadata(file.metadata())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no whole safetensors file ({error}). Fetch or export it again.") from error
    except ContractError as error:
        raise ModelError(f"{path}: {error}") from error


def base_folder(path: Path, contract: Contract) -> Path:
    """Find the folder with the parts that a student's file leaves out."""
    for folder in (path.parent.parent, WEIGHTS / contract.base):
        if (folder / CONTRACT_FILE).is_file():
            return folder
    raise ModelError(
        f"{path} holds only the UNet of a student of {contract.base}, and {contract.base} is not built in. "
        f"Put it into the folder `students` of that model."
    )


def weights_variant(folder: Path) -> str | None:
    """Return "fp16" where a part of a model has only such weights; ModelError where it has none but pickles."""
    if any(".fp16." not in path.name for path in folder.glob("*.safetensors")):
        return None
    if any(folder.glob("*.fp16.safetensors")):
        return "fp16"
    found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
    raise ModelError(
        f"{folder} has no .safetensors weights (found: {found}). Pickled weights can run code, so they are not read: "
        "load them once with diffusers and call save_pretrained(folder, safe_serialization=True)."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a config; ModelError where it is missing or damaged."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist: that part of the model is missing. Fetch or train it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Fetch that model again.") from error
    return values


def _folder_contract(folder: Path) -> Contract:
    if not (folder / CONTRACT_FILE).is_file():
        return _derived_contract(folder)
    try:
        return Contract.from_json((folder / CONTRACT_FILE).read_text(encoding="utf-8"))
    except ContractError as error:
        raise ModelError(f"{folder / CONTRACT_FILE}: {error}") from error


def _derived_contract(folder: Path) -> Contract:
    """Say of a teacher what its configs tell; how many steps and how much guidance it likes, they do not."""
    kind = read_json(folder / INDEX_FILE).get("_class_name", "nothing")
    unet, vae = read_json(folder / "unet" / "config.json"), read_json(folder / "vae" / "config.json")
    if not str(kind).startswith("StableDiffusionXL") or unet.get("addition_embed_type") != "text_time":
        raise ModelError(
            f"{folder} is a {kind} whose UNet has addition_embed_type {unet.get('addition_embed_type')!r}. Expected an "
            "SDXL base or fine-tune (StableDiffusionXLPipeline, 'text_time'); nothing else is distilled here."
        )
    if unet.get("in_channels") != unet.get("out_channels"):
        raise ModelError(f"{folder} takes {unet.get('in_channels')} channels: an inpainting UNet is no teacher here.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    said = scheduler.get("prediction_type", "epsilon")
    if said not in PREDICTION_TYPES:
        raise ModelError(f"{folder} predicts {said!r}; known are {', '.join(PREDICTION_TYPES)}.")
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    multiple = pixels * 2 ** (len(unet["block_out_channels"]) - 1)
    return Contract(
        name=folder.resolve().name,
        role="teacher",
        steps=DEFAULT_STEPS,
        trained_times=(),
        prediction_type=PREDICTION_TYPES[said],
        spacing="trailing",
        guidance=DEFAULT_GUIDANCE,
        sizes=sizes_around(unet["sample_size"] * pixels, max(multiple, 64)),
        base=folder.resolve().name,
        lora_rank=None,
        lora_alpha=None,
        recipe="",
        version="",
    )


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(hub_id, ignore_patterns=list(_PICKLES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"{hub_id} is neither a folder here nor to be had from the hub ({str(error).splitlines()[0]}). "
            "Check the name and the connection, or give the path of a model folder."
        ) from error
    if not (found / INDEX_FILE).is_file():
        raise ModelError(f"{hub_id} has no {INDEX_FILE}: it is no diffusers folder. Give one that is.")
    return found
