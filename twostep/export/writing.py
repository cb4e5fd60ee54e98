"""A model as others load it: a diffusers folder, one file for ComfyUI, a UNet alone, or a LoRA by either custom.

Every file carries the sampling contract and ModelSpec (Stability AI's metadata, 1.0.1); weights are in 16 bits.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from jinja2 import Environment, StrictUndefined
from safetensors.torch import save
from torch import Tensor

from twostep.contract import Contract
from twostep.models.bundle import load_bundle, save_bundle
from twostep.models.contracts import PREDICTION_TYPES, base_folder, carries_contract, file_contract
from twostep.models.dialects import kohya, peft, read_lora
from twostep.models.folder import ModelError, find_model
from twostep.models.single_file import whole_weights
from twostep.runs.folder import write_whole

Target = Literal["diffusers", "comfyui", "unet", "lora-kohya", "lora-peft"]

SDXL = "stable-diffusion-xl-v1-base"
"""ModelSpec's name of the architecture, which small models of the same classes do not have."""

HERE = Path(__file__).parent


def export(model: str | Path, to: str, out: Path, *, steps: int | None = None, base: str | None = None) -> Path:
    """Write a model, or one of its students, as `to` says: into the folder `out` for diffusers, else into that file.

    A LoRA's layers are those of its base, which is found by its contract if not given. Raises ModelError for what the
    model is not, RunError for what cannot be written.
    """
    if to not in get_args(Target):
        raise ModelError(f"There is no export to {to!r}; there are {', '.join(get_args(Target))}.")
    if to.startswith("lora"):
        return _export_lora(find_model(model), to, out, base)
    bundle = load_bundle(model, steps=steps)
    if to == "diffusers":
        save_bundle(bundle, out)
        return _explain(out, bundle.contract, to, out / "README.md")
    contract = replace(bundle.contract, lora_rank=None, lora_alpha=None)
    weights = whole_weights(bundle.parts, bundle.codec.vae) if to == "comfyui" else bundle.parts["unet"].state_dict()
    return _write(weights, contract, out, to, bundle.denoiser.network.config.block_out_channels, contract.to_metadata())


def _export_lora(path: Path, to: str, out: Path, base: str | None) -> Path:
    contract = file_contract(path) if path.is_file() and carries_contract(path) else None
    if contract is not None and contract.lora_rank is None:
        raise ModelError(f"{path} is a student's whole UNet, no LoRA. Export it to unet, comfyui or diffusers.")
    if base is None and contract is None:
        raise ModelError(f"{path} does not say whose layers it has; name a model of that kind as the base.")
    bundle = load_bundle(base or base_folder(path, contract), outline=True)  # type: ignore[arg-type]
    lora = read_lora(path, bundle.parts, alpha=contract.lora_alpha if contract else None)
    first = next(iter(lora.values()))
    named = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    named |= {"ss_network_dim": str(first.rank), "ss_network_alpha": f"{first.alpha:g}"}
    weights, more = (kohya(lora, bundle.parts), named) if to == "lora-kohya" else peft(lora, bundle.parts)
    channels = bundle.denoiser.network.config.block_out_channels
    if contract is None:
        return _write(weights, replace(bundle.contract, name=path.stem), out, to, channels, more)
    return _write(weights, contract, out, to, channels, more | contract.to_metadata())


def _write(
    weights: Mapping[str, Tensor],
    contract: Contract,
    out: Path,
    to: str,
    channels: Iterable[int],
    metadata: dict[str, str],
) -> Path:
    weights = {key: (value.half() if value.dim() else value).cpu().contiguous() for key, value in weights.items()}
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].numpy().tobytes())
    architecture = SDXL if tuple(channels) == (320, 640, 1280) else f"{contract.base} (the classes of SDXL, smaller)"
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/lora" if to.startswith("lora") else architecture,
        "implementation": "diffusers" if to in ("unet", "lora-peft") else "sgm",
        "title": contract.name,
        "resolution": "x".join(map(str, contract.sizes[0])),
        "date": datetime.now(UTC).date().isoformat(),
        "prediction_type": next(name for name, kind in PREDICTION_TYPES.items() if kind == contract.prediction_type),
        "usage_hint": f"{contract.steps} steps, Euler, trailing times ('simple'), guidance {contract.guidance:g}",
        "hash_sha256": f"0x{digest.hexdigest()}",
    }
    with write_whole(out) as file:
        file.write(save(weights, metadata | {f"modelspec.{key}": value for key, value in spec.items()}))
    _explain(out, contract, to, out.with_suffix(".md"))
    if to != "lora-peft":
        _render("workflow.json", out.with_suffix(".json"), file=out.name, to=to, contract=contract)
    return out


def _explain(out: Path, contract: Contract, to: str, card: Path) -> Path:
    fields = {name.replace("_", " "): value for name, value in asdict(contract).items()}
    _render("card.md", card, file=out.name, to=to, contract=contract, fields=fields)
    return out


def _render(template: str, out: Path, **values: object) -> None:
    page = Environment(undefined=StrictUndefined, trim_blocks=True).from_string((HERE / template).read_text())
    with write_whole(out) as file:
        file.write(page.render(**values).encode())
