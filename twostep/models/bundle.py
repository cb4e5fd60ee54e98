"""A model as loaded from disk: denoiser, codec, text encoders, and the contract that says how to
sample it.

A model folder is what diffusers saves, with the teacher's contract in `twostep.json` and the
students as `students/*_unet.safetensors` (plain diffusers names, the contract in the metadata).
Nothing here samples or trains.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.contract import TOP_TIME, Contract, student_name
from twostep.diffusion import VariancePreserving
from twostep.files import write_atomically
from twostep.formats.locate import (
    CONFIGS,
    CONTRACT_FILE,
    INDEX_FILE,
    WEIGHTS,
    ModelError,
    fetch,
    find_model,
    read_json,
)
from twostep.formats.lora_files import merge_lora, read_lora
from twostep.formats.single_file import (
    PARTS,
    SDXL_BASE,
    FolderFiles,
    Outline,
    SingleFile,
    find_single_file,
    is_whole,
)
from twostep.media.image import ImageCodec
from twostep.models.contracts import (
    DIFFUSERS_NAMES,
    SDXL,
    goes_on_a_student,
    read_contracts,
    student_files,
)
from twostep.networks.adapters import PREFIX
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.text.clip import TextEncoders, quiet_transformers

Weights = SingleFile | Outline | None
"""Where weights are that do not lie beside their configs."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that sampling needs; `students` are the step counts that the same folder offers.

    `origin` is the model and the LoRAs as they were named when it was loaded.
    """

    denoiser: Denoiser
    codec: ImageCodec
    text: TextEncoders
    contract: Contract
    students: tuple[int, ...] = ()
    origin: tuple[str, ...] = ()

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels, with `whole` all of what
        they say.
        """
        return self.text.conditioning(prompts, width, height, whole=whole)

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask, and the latents of what is not masked, beside the noisy
        latents.
        """
        return bool(
            self.denoiser.network.config.in_channels != self.denoiser.network.config.out_channels
        )

    def as_teacher(self) -> Bundle:
        """Return the bundle itself if something can be distilled from it; ModelError if it is for
        inpainting.
        """
        if self.is_inpainting:
            raise ModelError(
                f"{self.contract.name} has an inpainting UNet, which is no teacher here: distil its base."
            )
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by the names that diffusers gives them."""
        first, second = self.text.encoders
        return {"unet": self.denoiser.network, "text_encoder": first, "text_encoder_2": second}

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Bundle:
        """Move every network to a device, and to a precision if one is given, in place; returns the
        bundle.
        """
        for network in (*self.parts.values(), self.codec.vae):
            nn.Module.to(network, device, dtype)  # diffusers' own would warn of nothing
        return self

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a picture of this size in pixels."""
        pixels = self.codec.pixels_per_latent
        return int(self.denoiser.network.config.out_channels), height // pixels, width // pixels


def load_bundle(
    model: str | Path = "nano", *, steps: int | None = None, outline: bool = False
) -> Bundle:
    """Load a built-in model, a model folder or a student's .safetensors; `steps` picks the student.

    None is the teacher, or the file's own student. `outline` reads configs alone and leaves the
    weights at random. Raises `ModelError` where there is no model or no such student, and lists
    those there are.
    """
    path = find_model(model, steps=steps, only=CONFIGS if outline else None)
    contracts = read_contracts(path)
    contract = (
        contracts[0] if steps is None else next((c for c in contracts if c.steps == steps), None)
    )
    if contract is None:
        there = ", ".join(str(contract.steps) for contract in contracts)
        advice = "A student draws in the steps that it was trained for, and in no others: load the one for these"
        raise ModelError(f"{model} has nothing for {steps} steps; there are {there}. {advice}.")
    single = (
        find_single_file(path)
        if path.is_file() and (contract.role == "teacher" or is_whole(path))
        else None
    )
    folder = path if path.is_dir() else single.folder if single else base_folder(path, contract)
    source = Outline() if outline else single
    # a folder may be a student's own
    file = path if path.is_file() else student_files(folder).get(contract.steps)
    if contract.role == "teacher" or source is not None:
        file = None
    of_unet = SingleFile(file, folder) if file and contract.lora_rank is None else source
    network: UNet2DConditionModel = _load(folder, "unet", of_unet)
    if file and contract.lora_rank is not None:
        merge_lora(read_lora(file, {"unet": network}, alpha=contract.lora_alpha), {"unet": network})
    denoiser = Denoiser(network, load_schedule(folder), contract.prediction_type)
    offered = tuple(sorted(student_files(folder), reverse=True))
    return Bundle(
        denoiser,
        load_codec(folder, source),
        load_text(folder, source),
        contract,
        offered,
        (str(model),),
    )


def save_bundle(bundle: Bundle, folder: Path) -> None:
    """Write a teacher as a diffusers folder of fp16 weights with its contract; any SDXL pipeline
    loads it.
    """
    networks, (tokenizer, tokenizer_2) = (
        {**bundle.parts, "vae": bundle.codec.vae},
        bundle.text.tokenizers,
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    predicts = DIFFUSERS_NAMES[bundle.contract.prediction_type]
    with quiet_transformers():
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline(
            **{name: _half(network) for name, network in networks.items()},
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            scheduler=EulerDiscreteScheduler(
                **betas, timestep_spacing="trailing", prediction_type=predicts
            ),
            force_zeros_for_empty_prompt=bundle.text.zeros_for_empty,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)
    clean_configs(folder)
    (folder / CONTRACT_FILE).write_text(bundle.contract.to_json())


def embed_no_guidance(network: UNet2DConditionModel) -> None:
    """Tell diffusers that guidance is distilled in, so that its pipelines never guide: embed its
    scale, with zeros.
    """
    network.register_to_config(time_cond_proj_dim=256)
    network.time_embedding.cond_proj = nn.Linear(
        256, network.time_embedding.linear_1.in_features, bias=False
    )
    nn.init.zeros_(network.time_embedding.cond_proj.weight)


def save_student(weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
    """Write a student's UNet or LoRA into its teacher's folder: fp16, the contract in the metadata.

    A UNet has diffusers' names; a LoRA those that diffusers' `load_lora_weights` reads.
    """
    path = student_path(contract, folder)
    if contract.lora_rank is not None:
        weights = {f"{PREFIX}{key}": value for key, value in weights.items()}
    with write_atomically(path) as file:
        file.write(
            save({key: value.half() for key, value in weights.items()}, contract.to_metadata())
        )
    return path


def student_path(contract: Contract, folder: Path) -> Path:
    """Return where `save_student` writes a student of this contract."""
    kind = "unet" if contract.lora_rank is None else "lora"
    base = contract.name.removesuffix(student_name("", contract.steps))
    return folder / "students" / f"{base}_{contract.steps}step_{kind}.safetensors"


def load_schedule(folder: Path) -> VariancePreserving:
    """Read the noise schedule of a model folder; ModelError for one that this project's times do
    not fit.
    """
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    kind, num_times = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if (
        kind not in ("scaled_linear", "linear")
        or num_times != TOP_TIME
        or config.get("rescale_betas_zero_snr")
    ):
        zero_snr = ", rescaled to zero SNR" if config.get("rescale_betas_zero_snr") else ""
        known = f"only scaled_linear and linear betas over {TOP_TIME} times are known"
        raise ModelError(
            f"{folder} has the schedule {kind!r} over {num_times} times{zero_snr}; {known}."
        )
    make = (
        VariancePreserving.scaled_linear if kind == "scaled_linear" else VariancePreserving.linear
    )
    return make(num_times, config["beta_start"], config["beta_end"])


def load_codec(folder: Path, single: Weights = None) -> ImageCodec:
    """Load the autoencoder of a model folder, frozen and in float32; its weights may be in a single
    file.
    """
    # Channels last: half as fast again on CPUs for a network that is all 3x3 convolutions.
    return ImageCodec(_load(folder, "vae", single).to(memory_format=torch.channels_last))


def base_folder(path: Path, contract: Contract) -> Path:
    """Find the folder with the parts that a student's file leaves out."""
    if goes_on_a_student(contract):
        raise ModelError(
            f"{path} is a LoRA that goes on {contract.base}. Load that, and this with it (--lora {path})."
        )
    for folder in (path.parent.parent, WEIGHTS / contract.base):
        if (folder / CONTRACT_FILE).is_file():
            return folder
    if contract.base == SDXL.base:
        parts = ("vae", "text_encoder*", *([] if contract.lora_rank is None else ["unet"]))
        return fetch(SDXL_BASE, only=(*CONFIGS, *(f"{part}/*.fp16.safetensors" for part in parts)))
    lacks = (
        f"holds only the UNet of a student of {contract.base}, and {contract.base} is not built in"
    )
    raise ModelError(f"{path} {lacks}. Put it into the folder `students` of that model.")


def hollow_networks(model: str | Path) -> dict[str, nn.Module]:
    """Return a model's networks by their names in its folder, without memory for weights;
    ModelError.
    """
    path = find_model(model, only=CONFIGS)
    folder = find_single_file(path).folder if path.is_file() else path
    with torch.device("meta"):
        return {name: _build(folder, name) for name in PARTS}


def _build(folder: Path, name: str) -> Any:
    """Make a network of a model folder by its config, on the device that is the default."""
    config = read_json(folder / name / "config.json")
    if name == "unet":
        config["time_cond_proj_dim"] = None  # see `embed_no_guidance`
    if name.startswith("text"):
        kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
        return kind(CLIPTextConfig.from_dict(config))
    tiny = config.get("_class_name") == "AutoencoderTiny"
    return (
        UNet2DConditionModel if name == "unet" else AutoencoderTiny if tiny else AutoencoderKL
    ).from_config(config)


def _load(folder: Path, name: str, source: Weights) -> Any:
    """Load a network of a model folder, with the weights beside its config or from elsewhere,
    frozen.
    """
    of = source or FolderFiles(folder)
    with torch.device(of.made_on):
        network = _build(folder, name)
    weights = {key: value.float() for key, value in of.weights(network, PARTS[name]).items()}
    network.load_state_dict(weights, assign=True)
    for module in network.modules():  # what no file has
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(module.position_ids.shape[-1])[None]
    return network.eval().requires_grad_(False)


def load_text(folder: Path, single: Weights = None) -> TextEncoders:
    """Load the text encoders of a model folder, frozen and in float32.

    SDXL's own index says that the empty prompt is all zeros; where there is no index it is encoded
    like any other.
    """
    index = read_json(folder / INDEX_FILE) if (folder / INDEX_FILE).is_file() else {}
    encoders = (_load(folder, "text_encoder", single), _load(folder, "text_encoder_2", single))
    first, second = (
        CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")
    )
    return TextEncoders(
        (first, second), encoders, bool(index.get("force_zeros_for_empty_prompt", False))
    )


def clean_configs(folder: Path) -> None:
    """Take out of a model's configs where its parts were loaded from, and what loading warns of."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        # transformers obeys it where nothing else is asked for, and diffusers then has its own
        # networks in float32.
        config |= dict.fromkeys(config.keys() & {"dtype", "torch_dtype"}, "float32")
        if config.get("_class_name") == "AutoencoderTiny":
            # diffusers derives it, and warns where it is given.
            config.pop("block_out_channels", None)
        path.write_text(json.dumps(config, indent=2))


def _half(network: nn.Module) -> Any:
    return copy.deepcopy(network).half().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
