"""From one form of file to another, bit for bit: LoRAs between dialects, whole models between one
file and a folder.

What a folder has no place for (unused keys, the metadata) lies there in a file of its own, and
comes back from it.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.export.writing import open_lora
from twostep.formats.identify import kind_of, read_header
from twostep.formats.ldm_names import clip_l_names
from twostep.formats.locate import CONTRACT_FILE, ModelError, find_model, read_json
from twostep.formats.lora_files import DIALECTS, write_lora
from twostep.formats.single_file import (
    LEFT_OUT,
    PARTS,
    FolderFiles,
    find_single_file,
    whole_weights,
)
from twostep.models.bundle import clean_configs, hollow_networks
from twostep.models.contracts import DIFFUSERS_NAMES, carried_contract, read_contracts

REST = "single_file_rest.safetensors"


def convert(model: str | Path, to: str, out: Path, *, base: str | None = None) -> Path:
    """Write a LoRA in another of `DIALECTS`, a whole file as a "diffusers" folder, or a folder as a
    "single-file".

    Raises ModelError for what is not all there, has keys that nobody knows, or is of another kind.
    """
    path = find_model(model)
    what = "a folder" if path.is_dir() else kind_of(read_header(path)).what
    if out.exists():
        raise ModelError(f"{out} is already there. Give another --out, or delete it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if what == "a LoRA" and to in DIALECTS:
        return _convert_lora(path, to, out, base)
    if what == "a folder" and to == "single-file":
        return _join(path, out)
    if what == "a whole checkpoint" and to == "diffusers":
        return _divide(path, out)
    known = f"a LoRA goes to {', '.join(DIALECTS)}, a whole checkpoint to diffusers, a folder to single-file"
    raise ModelError(f"{path} is {what}, which does not go to {to!r}: {known}.")


def _convert_lora(path: Path, to: str, out: Path, base: str | None) -> Path:
    lora, networks, _ = open_lora(path, base)
    tensors, told = write_lora(lora, networks, to)
    kept = {
        key: value
        for key, value in read_header(path).metadata.items()
        if key != "lora_adapter_metadata"
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, out, {**kept, **told})
    return out


def _divide(path: Path, out: Path) -> Path:
    single, header = find_single_file(path), read_header(path)
    networks, (contract,) = hollow_networks(single.folder), read_contracts(path)
    divided = {name: single.weights(networks[name], part) for name, part in PARTS.items()}
    left = (
        "*.safetensors",
        "*.bin",
        "*.msgpack",
        "*.onnx*",
        "*.index.*json",
        "students",
        CONTRACT_FILE,
    )
    shutil.copytree(single.folder, out, ignore=shutil.ignore_patterns(*left))
    for name, weights in divided.items():
        names = (
            clip_l_names(weights)
            if name == "text_encoder"
            else dict(zip(weights, weights, strict=True))
        )
        file = (
            out
            / name
            / ("model.safetensors" if "text" in name else "diffusion_pytorch_model.safetensors")
        )
        save_file(
            {names[key]: value.contiguous() for key, value in weights.items()},
            file,
            {"format": "pt"},
        )
    rest = [
        key
        for key in header.shapes
        if key.endswith(LEFT_OUT) or not key.startswith(tuple(PARTS.values()))
    ]
    with safe_open(path, "pt") as read:
        save_file({key: read.get_tensor(key) for key in rest}, out / REST, header.metadata)
    if carried_contract(path):
        (out / CONTRACT_FILE).write_text(contract.to_json())
    clean_configs(out)
    scheduler = read_json(out / "scheduler" / "scheduler_config.json")
    scheduler["prediction_type"] = DIFFUSERS_NAMES[contract.prediction_type]
    scheduler |= {"timestep_spacing": "trailing"} if contract.role == "student" else {}
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2))
    return out


def _join(folder: Path, out: Path) -> Path:
    networks = hollow_networks(folder)
    for name, part in PARTS.items():
        networks[name].load_state_dict(
            FolderFiles(folder).weights(networks[name], part), assign=True
        )
    contract, rest = read_contracts(folder)[0], dict[str, Tensor]()
    told = contract.to_metadata() if (folder / CONTRACT_FILE).is_file() else {}
    if contract.prediction_type == "v":
        rest["v_pred"] = torch.zeros(0)  # as whole files say it
    if (folder / REST).is_file():
        rest, told = rest | load_file(folder / REST), read_header(folder / REST).metadata | told
    save_file(
        {key: value.contiguous() for key, value in (whole_weights(networks) | rest).items()},
        out,
        told,
    )
    return out
