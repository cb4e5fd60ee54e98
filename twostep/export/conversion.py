"""From one form of file to another, bit for bit: LoRAs between dialects, whole models between one
file and a folder.

What a folder has no place for (unused keys, the metadata) lies there in a file of its own, and
comes back from it.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from twostep.contract import Contract
from twostep.export.pictures_only import check_is_of_pictures
from twostep.export.writing import open_lora
from twostep.files import reporting_write_errors, write_atomically
from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.diffusers_names import (
    DIFFUSERS_NAMES,
    noise_of_scheduler,
    scheduler_settings,
)
from twostep.formats.folders import weights_folder
from twostep.formats.header import read_header
from twostep.formats.identify import WHOLE
from twostep.formats.ldm_names import clip_l_names
from twostep.formats.locate import CONTRACT_FILE, INDEX_FILE, ModelError, read_json
from twostep.formats.lora_files import DIALECTS, write_lora
from twostep.formats.single_file import (
    LEFT_OUT,
    PARTS,
    FolderFiles,
    SingleFile,
    find_single_file,
    noise_marks,
    whole_weights,
)
from twostep.models.sdxl import clean_configs
from twostep.models.sdxl_networks import hollow_networks
from twostep.text.vocabulary import END, clip_tokenizer

REST = "single_file_rest.safetensors"
"""What a whole file had and the networks of a folder do not need."""

_NOT_COPIED = (
    "*.safetensors",
    "*.bin",
    "*.msgpack",
    "*.onnx*",
    "*.index.*json",
    "students",
    CONTRACT_FILE,
)
"""What is left behind of the folder whose configs are taken."""


def convert(model: str | Path | Checkpoint, to: str, out: Path, *, base: str | None = None) -> Path:
    """Write a model's file in another form.

    Arguments:
        model: a LoRA, a whole checkpoint in one file, or a diffusers folder; a path, a name, or on
            the hub.
        to: one of `DIALECTS` for a LoRA, "diffusers" for a whole checkpoint, "single-file" for a
            folder.
        out: the file or folder to write, which must not exist.
        base: a model with the layers of a LoRA that does not say them.

    Returns `out`. Raises ModelError for what is incomplete, has unknown keys, or is of another
    kind.
    """
    if out.exists():
        raise ModelError(f"{out} is already there. Give another --out, or delete it.")
    checkpoint = resolve(model)
    check_is_of_pictures(checkpoint, "conversions")
    if checkpoint.is_lora and to in DIALECTS:
        return _convert_lora(checkpoint, to, out, base)
    if checkpoint.is_folder and to == "single-file":
        return _join(checkpoint, out)
    if checkpoint.kind.what == WHOLE and to == "diffusers":
        return _divide(checkpoint, out)
    raise ModelError(
        f"{checkpoint.path} is {checkpoint.kind.what}, which does not go to {to!r}: a LoRA goes to "
        f"{', '.join(DIALECTS)}, a whole checkpoint to diffusers, a folder to single-file."
    )


def _convert_lora(lora: Checkpoint, to: str, out: Path, base: str | None) -> Path:
    """Write a LoRA in another dialect; its other metadata stays."""
    changes, networks = open_lora(lora, base)
    tensors, metadata = write_lora(changes, networks, to)
    kept = dict(lora.file.metadata)
    kept.pop("lora_adapter_metadata", None)  # belongs to the dialect that it came in
    _save(tensors, out, {**kept, **metadata})
    return out


def _divide(checkpoint: Checkpoint, out: Path) -> Path:
    """Write a whole checkpoint as a folder, with the configs that fit it."""
    single = find_single_file(checkpoint.file)
    networks = hollow_networks(checkpoint)
    contract = checkpoint.contract
    # All is read before anything is written, so that a damaged file leaves nothing behind.
    divided = {name: single.weights(networks[name], part) for name, part in PARTS.items()}
    with weights_folder(out) as partial:
        _fill(partial, single, divided)
        _write_configs(single, partial)
        _save(_rest(single), partial / REST, checkpoint.file.metadata)
        if checkpoint.carried is not None:
            (partial / CONTRACT_FILE).write_text(contract.to_json(), encoding="utf-8")
        clean_configs(partial)
        _adapt_scheduler(partial / "scheduler" / "scheduler_config.json", contract)
    return out


def _fill(folder: Path, single: SingleFile, divided: dict[str, dict[str, Tensor]]) -> None:
    """Write configs and weights of all networks into a folder."""
    shutil.copytree(
        single.folder,
        folder,
        ignore=shutil.ignore_patterns(*_NOT_COPIED),
        dirs_exist_ok=True,
        copy_function=_copy,
    )
    for name, weights in divided.items():
        file = "model.safetensors" if "text" in name else "diffusion_pytorch_model.safetensors"
        if name == "text_encoder":
            names = clip_l_names(weights)
            weights = {names[key]: value for key, value in weights.items()}
        _save(weights, folder / name / file, {"format": "pt"})


def _copy(source: str, out: str) -> None:
    """Copy a file; WriteError at the first that cannot be, where `shutil` would go on and forget
    the reason.
    """
    with reporting_write_errors(out):
        shutil.copy2(source, out)


def _write_configs(single: SingleFile, out: Path) -> None:
    """Write what a file says of its networks itself, and CLIP's tokenizers where there are none."""
    for name in ("unet", "vae"):
        (out / name / "config.json").write_text(json.dumps(single.config(name), indent=2))
    for folder, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        if not (out / folder).is_dir():
            clip_tokenizer(pad).save_pretrained(out / folder)


def _rest(single: SingleFile) -> dict[str, Tensor]:
    """Return the tensors of a whole file that no network needs."""
    rest = {}
    for key in single.header.shapes:
        if key.endswith(LEFT_OUT) or not key.startswith(tuple(PARTS.values())):
            rest[key] = single.tensor(key)
    return rest


def _adapt_scheduler(path: Path, contract: Contract) -> None:
    """Let a scheduler's config say what the contract does about prediction and spacing."""
    config = read_json(path)
    _, schedule = noise_of_scheduler(config, path.parent)
    if schedule != contract.schedule:
        name, settings = scheduler_settings(contract.schedule)
        config = {"_class_name": name, **settings}
    config["prediction_type"] = DIFFUSERS_NAMES[contract.prediction_type]
    if contract.role == "student":
        config["timestep_spacing"] = "trailing"
    if contract.sampler == "renoise":
        config["_class_name"] = "LCMScheduler"
        index_path = path.parents[1] / INDEX_FILE
        index = read_json(index_path)
        index["scheduler"] = ["diffusers", "LCMScheduler"]
        index_path.write_text(json.dumps(index, indent=2))
    path.write_text(json.dumps(config, indent=2))


def _join(checkpoint: Checkpoint, out: Path) -> Path:
    """Write a folder as a whole checkpoint, with what `_divide` laid aside."""
    folder = checkpoint.path
    networks = hollow_networks(checkpoint)
    files = FolderFiles(folder)
    for name, part in PARTS.items():
        networks[name].load_state_dict(files.weights(networks[name], part), assign=True)
    rest: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    rest |= noise_marks(checkpoint.contract, files.config("vae"))
    if (folder / REST).is_file():
        rest |= load_file(folder / REST)
        metadata |= read_header(folder / REST).metadata
    if (folder / CONTRACT_FILE).is_file():
        metadata |= checkpoint.contract.to_metadata()
    _save(whole_weights(networks) | rest, out, metadata)
    return out


def _save(tensors: dict[str, Tensor], out: Path, metadata: dict[str, str]) -> None:
    data = save({key: value.contiguous() for key, value in tensors.items()}, metadata)
    with write_atomically(out) as file:
        file.write(data)
