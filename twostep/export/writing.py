"""A model as others load it: a diffusers folder, one file for ComfyUI, a UNet alone, or a LoRA by
either custom.

Every file carries the sampling contract and ModelSpec (Stability AI's metadata, 1.0.1); whole
networks are written in 16 bits, LoRAs as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from twostep.contract import Contract
from twostep.export.card import Card, write_workflows
from twostep.files import write_atomically
from twostep.formats.ldm_names import clip_l_names
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import LowRank, read_lora, write_lora
from twostep.formats.single_file import SDXL_BASE, Naming, whole_weights
from twostep.models.bundle import (
    Bundle,
    base_folder,
    embed_no_guidance,
    hollow_networks,
    save_bundle,
)
from twostep.models.contracts import (
    DIFFUSERS_NAMES,
    SDXL,
    carried_contract,
    read_contracts,
    student_files,
)
from twostep.models.lora_stack import load_with_loras

TARGETS = ("diffusers", "comfyui", "unet", "lora-kohya", "lora-peft")


@dataclass(frozen=True)
class ExportJob:
    """A model on its way out: what it says of itself, in which form and whereto it goes, and what
    its card shows.
    """

    contract: Contract
    to: str
    out: Path
    network: nn.Module
    card: Card

    def send(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Write a file with its card and, where ComfyUI reads it, its workflows; returns the file."""
        file = save({key: value.cpu().contiguous() for key, value in weights.items()})
        stamp(file, self.out, {"format": "pt", **metadata, **self.model_spec})
        self.card.write(self.contract, self.to, self.out, full_size=self.full_size)
        if self.to != "lora-peft":
            write_workflows(self.contract, self.to, self.out)
        return self.out

    @property
    def full_size(self) -> bool:
        """Whether it is SDXL itself: smaller models of its classes most programs do not know."""
        return tuple(self.network.config.block_out_channels) == (320, 640, 1280)  # type: ignore[union-attr,arg-type]

    @property
    def model_spec(self) -> dict[str, str]:
        """What ModelSpec says of it, all but the digest."""
        contract = self.contract
        named = (
            "stable-diffusion-xl-v1-base"
            if self.full_size
            else f"{contract.base} (SDXL's classes, smaller)"
        )
        spec = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{named}/lora" if self.to.startswith("lora") else named,
            "implementation": "sgm" if self.to in ("comfyui", "lora-kohya") else "diffusers",
            "title": contract.name,
            "resolution": "x".join(map(str, contract.sizes[0])),
            "date": datetime.now(UTC).date().isoformat(),
            "prediction_type": DIFFUSERS_NAMES[contract.prediction_type].removesuffix(
                "_prediction"
            ),
            "usage_hint": f"{contract.steps} steps, Euler, trailing times ('simple'), guidance {contract.guidance:g}",
        }
        return {f"modelspec.{key}": value for key, value in spec.items()}


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
    """Write a model, or one of its students, as `to` says: into the folder `out` for diffusers,
    else into that file.

    `loras` are merged in. A LoRA's layers are those of its base, which is found by its contract if
    not given. Raises ModelError for what the model is not, WriteError for what cannot be written.
    """
    if to not in TARGETS:
        raise ModelError(f"There is no export to {to!r}; there are {', '.join(TARGETS)}.")
    if (out.suffix == ".safetensors") == (to == "diffusers"):
        raise ModelError(
            f"--out is {out}; expected a {'folder' if to == 'diffusers' else '.safetensors'} for {to}."
        )
    card = card or Card()
    if to.startswith("lora"):
        path = _lora_file(model, steps)
        lora, networks, own = open_lora(path, base)
        # One without a contract is a style: it is drawn with as its base is.
        contract = own or replace(read_contracts(str(base))[0], name=path.stem)
        tensors, told = write_lora(lora, networks, to.removeprefix("lora-"))
        told |= own.to_metadata() if own else {}
        return ExportJob(contract, to, out, networks["unet"], card).send(tensors, told)
    bundle = load_with_loras(model, loras, steps=steps)
    contract = replace(bundle.contract, lora_rank=None, lora_alpha=None)
    parcel = ExportJob(contract, to, out, bundle.denoiser.network, card)
    return _send_folder(bundle, parcel) if to == "diffusers" else _send_whole(bundle, parcel)


def open_lora(
    path: Path, base: str | None
) -> tuple[dict[str, LowRank], dict[str, nn.Module], Contract | None]:
    """Read a LoRA with hollow networks that have its layers, and its contract if it has one;
    ModelError.
    """
    contract = carried_contract(path)
    if contract is not None and contract.lora_rank is None:
        raise ModelError(
            f"{path} is a student's whole network, no LoRA. Export it to unet, comfyui or diffusers."
        )
    if base is None and contract is None:
        raise ModelError(
            f"{path} does not say whose layers it has; name a model of that kind as the base."
        )
    of_sdxl = contract is not None and contract.base == SDXL.base
    found = base or (SDXL_BASE if of_sdxl else base_folder(path, contract))  # type: ignore[arg-type]
    networks = hollow_networks(found)
    del networks["vae"]
    return (
        read_lora(path, networks, alpha=contract.lora_alpha if contract else None),
        networks,
        contract,
    )


def _lora_file(model: str | Path, steps: int | None) -> Path:
    """Find a LoRA's file, or the one of so many steps in a model's folder."""
    path = find_model(model)
    if path.is_file():
        return path
    found = student_files(path, "lora")
    if steps is None or steps not in found:
        there = (
            f"there are LoRAs for {', '.join(map(str, found))}"
            if found
            else "it has none; `twostep extract` can"
        )
        raise ModelError(f"{model} is a folder, and {steps or 'no'} steps were asked for: {there}.")
    return found[steps]


def _send_folder(bundle: Bundle, parcel: ExportJob) -> Path:
    out = parcel.out
    if parcel.contract.role == "student":
        embed_no_guidance(bundle.denoiser.network)
    save_bundle(replace(bundle, contract=parcel.contract), out)
    unet, encoder = (
        out / "unet" / "diffusion_pytorch_model.safetensors",
        out / "text_encoder" / "model.safetensors",
    )
    stamp(unet.read_bytes(), unet, parcel.contract.to_metadata() | parcel.model_spec)
    # older transformers find nothing without the first word
    stamp(encoder.read_bytes(), encoder, {}, clip_l_names)
    parcel.card.write(parcel.contract, parcel.to, out, full_size=parcel.full_size)
    return out


def _send_whole(bundle: Bundle, parcel: ExportJob) -> Path:
    networks = {**bundle.parts, "vae": bundle.codec.vae} if parcel.to == "comfyui" else bundle.parts
    weights = (
        whole_weights(networks) if parcel.to == "comfyui" else bundle.denoiser.network.state_dict()
    )
    halves = {key: value.half() for key, value in weights.items()}
    if over := next((key for key, value in halves.items() if not value.isfinite().all()), None):
        raise ModelError(
            f"{over} of {parcel.contract.name} is not finite in 16 bits: damaged, or too large."
        )
    if parcel.to == "comfyui" and parcel.contract.prediction_type == "v":
        halves["v_pred"] = torch.zeros(0)  # by this programs know that a whole file predicts v
    return parcel.send(halves, parcel.contract.to_metadata())


def stamp(file: bytes, out: Path, metadata: Mapping[str, str], names: Naming | None = None) -> None:
    """Write a safetensors file with more metadata and the digest of its tensors, and maybe with
    other names.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header, body = json.loads(file[8:end]), memoryview(file)[end:]
    told = (
        header.pop("__metadata__", {})
        | metadata
        | {"modelspec.hash_sha256": f"0x{sha256(body).hexdigest()}"}
    )
    called = names(header) if names else dict(zip(header, header, strict=True))
    text = json.dumps(
        {"__metadata__": told, **{called[key]: value for key, value in header.items()}}
    ).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    with write_atomically(out) as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.write(body)
