"""A model as loaded from disk: denoiser, codec, text encoders, and the contract that says how to sample it.

A model folder is what diffusers saves, with the teacher's contract in `twostep.json` and the students as
`students/*_unet.safetensors` (plain diffusers names, the contract in the metadata). Nothing here samples or trains.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from twostep.contract import Contract, ContractError
from twostep.diffusion import NoiseSchedule
from twostep.errors import TwostepError
from twostep.models.codec import ImageCodec
from twostep.models.conditioning import Conditioning
from twostep.models.denoiser import Denoiser
from twostep.models.lora import LoraError, add_lora, merge
from twostep.models.text import TextEncoders
from twostep.runs.folder import write_whole

WEIGHTS = Path(__file__).parent.parent / "weights"
CONTRACT_FILE = "twostep.json"
LORA_PREFIX = "unet."


class ModelError(TwostepError):
    """Something that is no model, is damaged, or has no student of that many steps."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that sampling needs; `students` are the step counts that the same folder offers."""

    denoiser: Denoiser
    codec: ImageCodec
    text: TextEncoders
    contract: Contract
    students: tuple[int, ...] = ()

    def conditioning(self, prompts: Sequence[str], width: int, height: int) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels."""
        return self.text.conditioning(prompts, width, height)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a picture of this size in pixels."""
        pixels = self.codec.pixels_per_latent
        return int(self.denoiser.network.config.in_channels), height // pixels, width // pixels


def load_bundle(model: str | Path = "nano", *, steps: int | None = None) -> Bundle:
    """Load a built-in model, a model folder or a student's .safetensors; `steps` picks the student.

    None is the teacher, or the file's own student. Raises `ModelError` where there is no model or no such student,
    and lists those there are.
    """
    path = find_model(model)
    contracts = read_contracts(path)
    offered = [contract.steps for contract in contracts]
    contract = contracts[0] if steps is None else next((c for c in contracts if c.steps == steps), None)
    if contract is None:
        raise ModelError(f"{model} has nothing for {steps} steps; there are {', '.join(map(str, offered))}.")
    folder = path if path.is_dir() else _base_folder(path, contracts[0])
    network = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    if contract.role == "student":
        file = path if path.is_file() else _student_files(folder)[contract.steps]
        network = _load_weights(network, file, contract)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    schedule = NoiseSchedule.scaled_linear(
        scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]
    )
    return Bundle(
        denoiser=Denoiser(network.eval().requires_grad_(False), schedule, contract.prediction_type),
        codec=load_codec(folder),
        text=load_text(folder),
        contract=contract,
        students=tuple(sorted(_student_files(folder), reverse=True)),
    )


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a teacher as a diffusers folder of fp16 weights with its contract; any SDXL pipeline loads it."""
    with _quiet_transformers():
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        vae=_half(bundle.codec.vae),
        text_encoder=_half(bundle.text.encoders[0]),
        text_encoder_2=_half(bundle.text.encoders[1]),
        tokenizer=bundle.text.tokenizers[0],
        tokenizer_2=bundle.text.tokenizers[1],
        unet=_half(bundle.denoiser.network),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
        ),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    with _quiet_transformers():
        pipeline.save_pretrained(folder)
    _clean_configs(folder)
    (folder / CONTRACT_FILE).write_text(bundle.contract.to_json())


def save_student(weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
    """Write a student's UNet or LoRA into its teacher's folder: fp16, the contract in the metadata.

    A UNet has diffusers' names; a LoRA those that diffusers' `load_lora_weights` reads.
    """
    kind = "unet" if contract.lora_rank is None else "lora"
    path = folder / "students" / f"{contract.base}_{contract.steps}step_{kind}.safetensors"
    if contract.lora_rank is not None:
        weights = {f"{LORA_PREFIX}{key}": value for key, value in weights.items()}
    with write_whole(path) as file:
        file.write(save({key: value.half() for key, value in weights.items()}, contract.to_metadata()))
    return path


def read_contracts(model: str | Path) -> list[Contract]:
    """Read the contracts of a model without its weights: the teacher's first, then the students' by falling steps."""
    path = find_model(model)
    if path.is_file():
        return [_file_contract(path)]
    try:
        teacher = Contract.from_json((path / CONTRACT_FILE).read_text(encoding="utf-8"))
    except ContractError as error:
        raise ModelError(f"{path / CONTRACT_FILE}: {error}") from error
    students = [_file_contract(file) for file in _student_files(path).values()]
    return [teacher, *sorted(students, key=lambda contract: -contract.steps)]


def find_model(model: str | Path) -> Path:
    """Return the folder or .safetensors file of a model; raises `ModelError`."""
    built_in = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{CONTRACT_FILE}"))
    path = WEIGHTS / str(model) if str(model) in built_in else Path(model)
    if path.is_file() or (path / CONTRACT_FILE).is_file():
        return path
    problem = f"has no {CONTRACT_FILE}, so it is no model folder" if path.is_dir() else "does not exist"
    names = ", ".join(built_in) or "none"
    raise ModelError(f"{path} {problem}. Give a model folder, a .safetensors file or a built-in name ({names}).")


def _student_files(folder: Path) -> dict[int, Path]:
    return {_file_contract(file).steps: file for file in sorted(folder.glob("students/*_unet.safetensors"))}


def _file_contract(path: Path) -> Contract:
    try:
        with safe_open(path, "pt") as file:
            return Contract.from_metadata(file.metadata())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no whole safetensors file ({error}). Fetch or export it again.") from error
    except ContractError as error:
        raise ModelError(f"{path}: {error}") from error


def _base_folder(path: Path, contract: Contract) -> Path:
    """Find the folder with the parts that a student's file leaves out."""
    for folder in (path.parent.parent, WEIGHTS / contract.base):
        if (folder / CONTRACT_FILE).is_file():
            return folder
    raise ModelError(
        f"{path} holds only the UNet of a student of {contract.base}, and {contract.base} is not built in. "
        f"Put it into the folder `students` of that model."
    )


def _load_weights(network: UNet2DConditionModel, path: Path, contract: Contract) -> UNet2DConditionModel:
    """Return the network with a student's weights: its own, or its LoRA's merged into the base's."""
    weights: dict[str, Tensor] = load_file(path)
    try:
        if contract.lora_rank is None:
            network.load_state_dict(weights)
            return network
        lora = add_lora(network, "student", rank=contract.lora_rank, alpha=contract.lora_alpha)
        lora.load_state_dict({key.removeprefix(LORA_PREFIX): value for key, value in weights.items()})
    except (RuntimeError, LoraError) as error:
        raise ModelError(f"{path} does not fit the UNet of its base: {str(error).splitlines()[-1].strip()}") from error
    return merge(network, lora.name)


def load_codec(folder: Path) -> ImageCodec:
    """Load the autoencoder of a model folder, frozen and in float32."""
    _expect(folder / "vae" / "config.json")
    kind = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    autoencoder = AutoencoderTiny if kind == "AutoencoderTiny" else AutoencoderKL
    vae = autoencoder.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    # Channels last: half as fast again on CPUs for a network that is all 3x3 convolutions.
    return ImageCodec(vae.to(memory_format=torch.channels_last).eval().requires_grad_(False))


def load_text(folder: Path) -> TextEncoders:
    """Load the text encoders of a model folder, frozen and in float32."""
    _expect(folder / "text_encoder" / "config.json")
    tokenizers = tuple(CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2"))
    with _quiet_transformers():
        encoders = (
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval(),
        )
    for encoder in encoders:
        encoder.requires_grad_(False)
    return TextEncoders((tokenizers[0], tokenizers[1]), encoders)


def save_codec(codec: ImageCodec, folder: Path) -> None:
    """Write the autoencoder in the layout of a model folder."""
    codec.vae.save_pretrained(folder / "vae")
    _clean_configs(folder)


def save_text(text: TextEncoders, folder: Path) -> None:
    """Write text encoders and tokenizers in the layout of a model folder."""
    for name, tokenizer, encoder in zip(("", "_2"), text.tokenizers, text.encoders, strict=True):
        tokenizer.save_pretrained(folder / f"tokenizer{name}")
        with _quiet_transformers():
            encoder.save_pretrained(folder / f"text_encoder{name}")


def _clean_configs(folder: Path) -> None:
    """Take out of a model's configs where its parts were loaded from, and what loading warns of."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if config.get("_class_name") == "AutoencoderTiny":
            # diffusers derives it, and warns where it is given.
            config.pop("block_out_channels", None)
        path.write_text(json.dumps(config, indent=2))


def _expect(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path} does not exist. Train or fetch that part first; the recipe names where it is sought.")


def _half(network: nn.Module) -> nn.Module:
    half = copy.deepcopy(network).half()
    half.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return half


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep it from drawing a bar for every small file, and from asking for torchvision, which nothing here uses."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
