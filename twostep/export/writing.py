"""A model as other programs load it: a diffusers folder, one file for ComfyUI, a UNet alone, or a
LoRA in either custom.

Every file carries the sampling contract and ModelSpec (Stability AI's metadata, 1.0.1). Whole
networks are written in 16 bits, LoRAs as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from twostep.contract import Contract, EdmSpec
from twostep.export.card import Card, sampler_in_words, write_workflows
from twostep.export.pictures_only import check_is_of_pictures
from twostep.files import write_atomically
from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.contracts import SDXL
from twostep.formats.diffusers_names import DIFFUSERS_NAMES
from twostep.formats.folders import weights_folder
from twostep.formats.ldm_names import clip_l_names
from twostep.formats.locate import SDXL_BASE, ModelError
from twostep.formats.lora_files import read_lora, write_lora, write_motion_lora
from twostep.formats.lora_kinds import WeightChange
from twostep.formats.single_file import Naming, noise_marks, whole_weights
from twostep.models.bundle import Bundle
from twostep.models.loading import load_with_loras
from twostep.models.motion import open_motion_lora
from twostep.models.saving import save_bundle
from twostep.models.sdxl import SDXL_CHANNELS, autoencoder, base_folder, embed_no_guidance, is_sdxl
from twostep.models.sdxl_networks import hollow_networks
from twostep.training.halves import halved

MOTION_LORA = "lora-animatediff"
"""A LoRA on a motion module by the names of AnimateDiff's own."""

TARGETS = ("diffusers", "comfyui", "unet", "lora-kohya", "lora-peft", MOTION_LORA)
"""The forms that a model can be exported to."""


@dataclass(frozen=True)
class ExportJob:
    """A model that is being exported.

    `contract` is what it says of itself, `to` one of `TARGETS`, `out` the file or folder to write.
    `network` is its UNet, whose shape alone counts, and `card` what is shown beside it.
    """

    contract: Contract
    to: str
    out: Path
    network: nn.Module
    card: Card

    def write(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
        """Write a file with its card and, where ComfyUI reads it, its workflows.

        Returns the file.
        """
        file = save({key: value.cpu().contiguous() for key, value in weights.items()})
        stamp(file, self.out, {"format": "pt", **metadata, **self.model_spec})
        self.write_card()
        if self.to != "lora-peft":
            write_workflows(self.contract, self.to, self.out)
        return self.out

    def write_card(self, *, name: str | None = None) -> None:
        """Write the card beside the file, or into the folder, which will be called `name`."""
        self.card.write(self.contract, self.to, self.out, full_size=self.full_size, name=name)

    @property
    def full_size(self) -> bool:
        """Whether it is SDXL itself; most programs do not know smaller models of its classes."""
        if not is_sdxl(self.contract):
            return False
        channels = self.network.config.block_out_channels  # type: ignore[union-attr]
        return tuple(channels) == SDXL_CHANNELS  # type: ignore[arg-type]

    @property
    def model_spec(self) -> dict[str, str]:
        """The fields of ModelSpec, all but the digest of the tensors."""
        contract = self.contract
        architecture = "stable-diffusion-xl-v1-base"
        if not self.full_size:
            architecture = f"{contract.base} (SDXL's classes, smaller)"
        if self.to.startswith("lora"):
            architecture = f"{architecture}/lora"
        uses_old_names = self.to in ("comfyui", "lora-kohya")
        predicts = DIFFUSERS_NAMES[contract.prediction_type]
        fields = {
            "sai_model_spec": "1.0.1",
            "architecture": architecture,
            "implementation": "sgm" if uses_old_names else "diffusers",
            "title": contract.name,
            "resolution": "x".join(map(str, contract.sizes[0])),
            "date": datetime.now(UTC).date().isoformat(),
            "prediction_type": predicts.removesuffix("_prediction"),
            "usage_hint": (
                f"{contract.steps} steps, {sampler_in_words(contract)}, "
                f"guidance {contract.guidance:g}"
            ),
        }
        return {f"modelspec.{name}": value for name, value in fields.items()}


def export(
    model: str | Path | Checkpoint,
    to: str,
    out: Path,
    *,
    steps: int | None = None,
    base: str | None = None,
    loras: tuple[str, ...] = (),
    card: Card | None = None,
) -> Path:
    """Write a model, or one of its students, in a form that other programs load.

    Arguments:
        model: what is to be exported; for a LoRA its file, or a folder that has it.
        to: one of `TARGETS`; "diffusers" is the folder of the model's own family.
        out: the folder for diffusers, otherwise the .safetensors file.
        steps: picks a student of a model that has several.
        base: a model with the layers of a LoRA; found by the LoRA's contract if not given.
        loras: LoRAs to merge in, each "file" or "file:weight".
        card: what the card shows beside the contract.

    Returns what was written. Raises ModelError for a model that is not what it should be,
    WriteError for what cannot be written.
    """
    _check_target(to, out)
    card = card or Card()
    if to == MOTION_LORA:
        return _export_motion_lora(resolve(model), steps, out, base=base, card=card)
    if to != "diffusers" or loras:
        what = "LoRAs" if to == "diffusers" else f"{to} files"
        model = resolve(model, steps=None if to.startswith("lora") else steps)
        check_is_of_pictures(model, what)
    if to.startswith("lora"):
        return _export_lora(_find_lora(model, steps), to, out, base=base, card=card)
    bundle = load_with_loras(model, loras, steps=steps)
    contract = replace(bundle.contract, lora_rank=None, lora_alpha=None)
    job = ExportJob(contract=contract, to=to, out=out, network=bundle.denoiser.network, card=card)
    if to != "diffusers":
        return _write_file(bundle, job)
    with weights_folder(out) as partial:
        folder_job = replace(job, out=partial)
        if is_sdxl(contract):
            _write_sdxl_folder(bundle, folder_job)
        else:
            save_bundle(replace(bundle, contract=contract), partial)
        folder_job.write_card(name=out.name)
    return out


def _check_target(to: str, out: Path) -> None:
    """Raise ModelError unless there is such an export, and `out` is what it writes."""
    if to not in TARGETS:
        raise ModelError(f"There is no export to {to!r}; there are {', '.join(TARGETS)}.")
    wants_folder = to == "diffusers"
    if (out.suffix == ".safetensors") == wants_folder:
        expected = "folder" if wants_folder else ".safetensors"
        raise ModelError(f"--out is {out}; expected a {expected} for {to}.")


def _export_lora(lora: Checkpoint, to: str, out: Path, *, base: str | None, card: Card) -> Path:
    """Write a LoRA in another form, with its contract or, for a style, that of its base."""
    changes, networks = open_lora(lora, base)
    contract = lora.carried
    metadata = {} if contract is None else contract.to_metadata()
    if contract is None:
        # Without a contract it is a style, which is sampled as its base is.
        contract = replace(resolve(str(base)).contract, name=lora.path.stem)
    tensors, more = write_lora(changes, networks, to.removeprefix("lora-"))
    _check_file(contract, to)
    job = ExportJob(contract=contract, to=to, out=out, network=networks["unet"], card=card)
    return job.write(tensors, more | metadata)


def _export_motion_lora(
    model: Checkpoint, steps: int | None, out: Path, *, base: str | None, card: Card
) -> Path:
    """Write a LoRA on a motion module as AnimateDiff-Evolved in ComfyUI reads it.

    Returns the file. Raises ModelError for what is no such LoRA.
    """
    contract = model.contract if model.is_folder else model.carried
    if contract is not None and contract.media != "video":
        raise ModelError(
            f"{contract.name} makes {contract.things}, and {MOTION_LORA} files are for LoRAs on "
            "the motion modules of clips."
        )
    lora = _find_lora(model, steps)
    carried = lora.carried
    if carried is not None and carried.lora_rank is None:
        raise ModelError(
            f"{lora.path} is a student's whole motion module, no LoRA. AnimateDiff-Evolved in "
            "ComfyUI loads it as it is."
        )
    tensors = write_motion_lora(open_motion_lora(lora, base))
    metadata = {} if carried is None else carried.to_metadata()
    file = save({name: value.contiguous() for name, value in tensors.items()})
    stamp(file, out, {"format": "pt", **metadata})
    if carried is not None:
        card.write(carried, MOTION_LORA, out, full_size=False)
    return out


def open_lora(
    lora: Checkpoint, base: str | None
) -> tuple[dict[str, WeightChange], dict[str, nn.Module]]:
    """Read a LoRA, and make networks without weights that have its layers.

    Arguments:
        lora: the file.
        base: a model with the same layers; found by the LoRA's contract if not given.

    Raises ModelError for what is no LoRA, or does not say which layers it has.
    """
    contract = lora.carried
    if contract is not None and contract.lora_rank is None:
        raise ModelError(
            f"{lora.path} is a student's whole network, no LoRA. Export it to unet, comfyui or "
            "diffusers."
        )
    model: str | Path
    if base is not None:
        model = base
    elif contract is None:
        raise ModelError(
            f"{lora.path} does not say whose layers it has; name a model of that kind as the base."
        )
    elif contract.base == SDXL.base:
        model = SDXL_BASE
    else:
        model = base_folder(lora.path, contract)
    networks = hollow_networks(model)
    del networks["vae"]
    alpha = None if contract is None else contract.lora_alpha
    return read_lora(lora, networks, alpha=alpha), networks


def _find_lora(model: str | Path | Checkpoint, steps: int | None) -> Checkpoint:
    """Return a LoRA's file, or the one of so many steps in a model's folder."""
    checkpoint = resolve(model)
    if not checkpoint.is_folder:
        return checkpoint
    loras = checkpoint.student_loras
    if steps is None or steps not in loras:
        offered = "it has none; `twostep extract` can"
        if loras:
            offered = f"there are LoRAs for {', '.join(map(str, loras))}"
        raise ModelError(
            f"{checkpoint.name} is a folder, and {steps or 'no'} steps were asked for: {offered}."
        )
    return loras[steps]


def _write_sdxl_folder(bundle: Bundle, job: ExportJob) -> None:
    """Write a folder as diffusers does, with ModelSpec and the contract in the UNet's file too."""
    if job.contract.role == "student":
        embed_no_guidance(bundle.denoiser.network)
    save_bundle(replace(bundle, contract=job.contract), job.out)
    unet = job.out / "unet" / "diffusion_pytorch_model.safetensors"
    stamp(unet.read_bytes(), unet, job.contract.to_metadata() | job.model_spec)
    # Older versions of transformers find nothing without the first word of CLIP's names.
    encoder = job.out / "text_encoder" / "model.safetensors"
    stamp(encoder.read_bytes(), encoder, {}, clip_l_names)


def _write_file(bundle: Bundle, job: ExportJob) -> Path:
    """Write a whole checkpoint for ComfyUI, or a UNet alone, in 16 bits.

    Returns the file. Raises ModelError for another family than SDXL, which such files have no names
    for, and for weights that are not finite in 16 bits.
    """
    _check_file(job.contract, job.to)
    vae: Any = autoencoder(bundle)
    marks = noise_marks(job.contract, vae.config)
    weights = bundle.denoiser.network.state_dict()
    if job.to == "comfyui":
        weights = whole_weights({**bundle.parts, "vae": vae})
    halves = halved(weights)
    for key, value in halves.items():
        if not value.isfinite().all():
            raise ModelError(
                f"{key} of {job.contract.name} is not finite in 16 bits: damaged, or too large."
            )
    if job.to == "comfyui":
        halves |= marks
    elif isinstance(job.contract.schedule, EdmSpec):
        raise ModelError(
            f"{job.contract.name} follows EDM, which a UNet alone cannot say. Export the whole "
            "model to comfyui, or to diffusers."
        )
    return job.write(halves, job.contract.to_metadata())


def _check_file(contract: Contract, to: str) -> None:
    """Raise ModelError unless single files have names and words for a model."""
    if not is_sdxl(contract):
        raise ModelError(
            f"{contract.name} is no SDXL model, and {to} files have names for SDXL alone. Export "
            "it to diffusers, which writes the folder of its own family."
        )
    if contract.sampling_times and to != "lora-peft":
        times = ", ".join(f"{t:g}" for t in contract.sampling_times)
        raise ModelError(
            f"{contract.name} visits the times {times}, which none of ComfyUI's schedulers does. "
            "Export it to diffusers, or its LoRA to lora-peft: there the times can be given."
        )
    if contract.prediction_type == "flow":
        raise ModelError(
            f"{contract.name} predicts flow, which programs that read {to} files do not expect of "
            "SDXL. Export it to diffusers."
        )


def stamp(file: bytes, out: Path, metadata: Mapping[str, str], names: Naming | None = None) -> None:
    """Write a safetensors file with more metadata, and the digest of its tensors.

    Arguments:
        file: the whole file as it was serialised.
        out: where it is written.
        metadata: what is added to the file's own.
        names: other names for the tensors, if they are to change.
    """
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    body = memoryview(file)[end:]
    stamped = header.pop("__metadata__", {}) | metadata
    stamped["modelspec.hash_sha256"] = f"0x{sha256(body).hexdigest()}"
    if names is not None:
        renamed = names(header)
        header = {renamed[key]: value for key, value in header.items()}
    text = json.dumps({"__metadata__": stamped, **header}).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight
    with write_atomically(out) as written:
        written.write(len(text).to_bytes(8, "little") + text)
        written.write(body)
