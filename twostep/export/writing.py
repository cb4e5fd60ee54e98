"""A model as others load it: a diffusers folder, one file for ComfyUI, a UNet alone, or a LoRA by either custom.

Every file carries the sampling contract and ModelSpec (Stability AI's metadata, 1.0.1); whole networks are written in 16
bits, LoRAs as they are.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from twostep.contract import Contract
from twostep.export.card import Card, is_full_size, write_workflows
from twostep.models.bundle import Bundle, embed_no_guidance, load_bundle, save_bundle
from twostep.models.contracts import PREDICTION_TYPES, base_folder, carries_contract, file_contract, lora_files
from twostep.models.dialects import LowRank, kohya, peft, read_lora
from twostep.models.folder import ModelError, find_model
from twostep.models.ldm import clip_l_names
from twostep.models.single_file import whole_weights
from twostep.models.worn import load_worn
from twostep.runs.folder import write_whole

Target = Literal["diffusers", "comfyui", "unet", "lora-kohya", "lora-peft"]

SDXL = "stable-diffusion-xl-v1-base"
"""ModelSpec's name of the architecture, which small models of the same classes do not have."""


def export(
    model: str | Path,
    to: str,
    out: Path,
    *,
    steps: int | None = None,
    base: str | None = None,
    loras: tuple[str, ...] = (),
    card: Card | None = None,
) -> Path:
    """Write a model, or one of its students, as `to` says: into the folder `out` for diffusers, else into that file.

    `loras` are merged in. A LoRA's layers are those of its base, which is found by its contract if not given. Raises
    ModelError for what the model is not, RunError for what cannot be written.
    """
    if to not in get_args(Target):
        raise ModelError(f"There is no export to {to!r}; there are {', '.join(get_args(Target))}.")
    if (out.suffix == ".safetensors") == (to == "diffusers"):
        raise ModelError(f"--out is {out}; expected a {'folder' if to == 'diffusers' else '.safetensors'} for {to}.")
    card = card or Card()
    if to.startswith("lora"):
        return _export_lora(_lora_file(model, steps), to, out, base, card)
    bundle = load_worn(model, loras, steps=steps)
    contract = replace(bundle.contract, lora_rank=None, lora_alpha=None)
    if to == "diffusers":
        return _export_folder(replace(bundle, contract=contract), out, card)
    weights = whole_weights(bundle.parts, bundle.codec.vae) if to == "comfyui" else bundle.parts["unet"].state_dict()
    if to == "comfyui" and contract.prediction_type == "v":
        weights["v_pred"] = torch.zeros(0)  # by this programs know that a whole file predicts v
    halves = {key: value.half() for key, value in weights.items()}
    if over := next((key for key, value in halves.items() if not value.isfinite().all()), None):
        raise ModelError(f"{over} of {contract.name} is not finite in 16 bits. The weights are damaged, or too large.")
    return _write(halves, out, to, bundle, contract, card)


def write_lora(
    lora: Mapping[str, LowRank], to: str, out: Path, bundle: Bundle, contract: Contract | None, card: Card
) -> Path:
    """Write a LoRA on this model's layers, for programs that read kohya's files, or by PEFT's names; returns `out`."""
    first = next(iter(lora.values()))
    more = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    more |= {"ss_network_dim": str(first.rank), "ss_network_alpha": f"{first.alpha:g}"}
    weights, more = (kohya(lora, bundle.parts), more) if to == "lora-kohya" else peft(lora, bundle.parts)
    told = contract or replace(bundle.contract, name=out.stem)
    return _write(weights, out, to, bundle, told, card, more, carried=contract is not None)


def _export_folder(bundle: Bundle, out: Path, card: Card) -> Path:
    unet, encoder = out / "unet" / "diffusion_pytorch_model.safetensors", out / "text_encoder" / "model.safetensors"
    if bundle.contract.role == "student":
        embed_no_guidance(bundle.denoiser.network)
    save_bundle(bundle, out)
    spec = bundle.contract.to_metadata() | _model_spec(bundle, bundle.contract, "diffusers")
    _stamp(unet.read_bytes(), unet, spec)
    _stamp(encoder.read_bytes(), encoder, {}, clip_l_names)  # older transformers find nothing without the first word
    card.write(bundle, bundle.contract, "diffusers", out)
    return out


def _lora_file(model: str | Path, steps: int | None) -> Path:
    """Find a LoRA's file, or the one of so many steps in a model's folder."""
    path = find_model(model)
    if path.is_file():
        return path
    found = lora_files(path)
    if steps not in found:
        there = f"there are LoRAs for {', '.join(map(str, found))}" if found else "it has none; `twostep extract` can"
        raise ModelError(f"{model} is a folder, and {steps or 'no'} steps were asked for: {there}.")
    return found[steps]


def _export_lora(path: Path, to: str, out: Path, base: str | None, card: Card) -> Path:
    contract = file_contract(path) if carries_contract(path) else None
    if contract is not None and contract.lora_rank is None:
        raise ModelError(f"{path} is a student's whole network, no LoRA. Export it to unet, comfyui or diffusers.")
    if base is None and contract is None:
        raise ModelError(f"{path} does not say whose layers it has; name a model of that kind as the base.")
    bundle = load_bundle(base or base_folder(path, contract), outline=True)  # type: ignore[arg-type]
    lora = read_lora(path, bundle.parts, alpha=contract.lora_alpha if contract else None)
    if card.prompts:
        bundle = load_worn(base or base_folder(path, contract), [str(path)])  # type: ignore[arg-type]
    return write_lora(lora, to, out, bundle, contract, card)


def _write(
    weights: Mapping[str, Tensor],
    out: Path,
    to: str,
    bundle: Bundle,
    contract: Contract,
    card: Card,
    more: Mapping[str, str] | None = None,
    *,
    carried: bool = True,
) -> Path:
    told = {**(more or {}), **(contract.to_metadata() if carried else {}), **_model_spec(bundle, contract, to)}
    _stamp(save({key: value.cpu().contiguous() for key, value in weights.items()}), out, {"format": "pt", **told})
    card.write(bundle, contract, to, out)
    if to != "lora-peft":
        write_workflows(contract, to, out)
    return out


def _model_spec(bundle: Bundle, contract: Contract, to: str) -> dict[str, str]:
    architecture = SDXL if is_full_size(bundle) else f"{contract.base} (the classes of SDXL, smaller)"
    said = next(name for name, kind in PREDICTION_TYPES.items() if kind == contract.prediction_type)
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora" if to.startswith("lora") else architecture,
        "implementation": "sgm" if to in ("comfyui", "lora-kohya") else "diffusers",
        "title": contract.name,
        "resolution": "x".join(map(str, contract.sizes[0])),
        "date": datetime.now(UTC).date().isoformat(),
        "prediction_type": said.removesuffix("_prediction"),
        "usage_hint": f"{contract.steps} steps, Euler, trailing times ('simple'), guidance {contract.guidance:g}",
    }
    return {f"modelspec.{key}": value for key, value in spec.items()}


def _stamp(
    file: bytes, out: Path, metadata: Mapping[str, str], names: Callable[[Iterable[str]], dict[str, str]] | None = None
) -> None:
    """Write a safetensors file with more metadata and the digest of its tensors, and maybe with other names."""
    end = 8 + int.from_bytes(file[:8], "little")
    header, body = json.loads(file[8:end]), memoryview(file)[end:]
    told = header.pop("__metadata__", {}) | metadata | {"modelspec.hash_sha256": f"0x{sha256(body).hexdigest()}"}
    called = names(header) if names else dict(zip(header, header, strict=True))
    text = json.dumps({"__metadata__": told, **{called[key]: value for key, value in header.items()}}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    with write_whole(out) as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.write(body)
