"""The family of SDXL: a UNet with two CLIP text encoders and an autoencoder, in diffusers' layout.

A model folder is what diffusers saves, with the teacher's contract in `twostep.json` and the
students as `students/*_unet.safetensors` or `*_lora.safetensors`, which carry theirs in the
metadata.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from twostep.contract import Contract, RectifiedFlowSpec, VariancePreservingSpec
from twostep.files import write_atomically
from twostep.formats.checkpoint import Checkpoint, look_at_folder, student_path
from twostep.formats.contracts import SDXL, goes_on_a_student
from twostep.formats.diffusers_names import DIFFUSERS_NAMES, scheduler_settings
from twostep.formats.locate import (
    CONFIGS,
    CONTRACT_FILE,
    SDXL_BASE,
    ModelError,
    fetch,
    model_of_student,
)
from twostep.formats.lora_files import merge_lora, read_lora
from twostep.formats.single_file import (
    FolderFiles,
    Outline,
    SingleFile,
    Weights,
    find_single_file,
)
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.sdxl_networks import load_codec, load_network, load_schedule, load_text
from twostep.models.tiny_decoder import save_own_decoder, with_own_decoder
from twostep.networks.adapters import PREFIX
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.text.clip import TextEncoders, quiet_transformers
from twostep.training.halves import halved

SDXL_CHANNELS = (320, 640, 1280)
"""The channels of SDXL's own UNet, by level, by which ComfyUI knows it."""


class SdxlFamily:
    """Loads and saves SDXL and smaller models of its classes."""

    name = "sdxl"

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model, or its student of so many steps, frozen and in float32.

        Arguments:
            checkpoint: a model folder, a whole checkpoint, or a student's UNet or LoRA.
            steps: picks the student; None is the model itself.
            outline: read configs alone, and leave the weights as they are initialised.

        Raises ModelError if weights are missing or damaged, or there is no such student.
        """
        return self._load(checkpoint, steps, outline=outline, lean=False)

    def load_to_draw(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model as `load` does, with networks that can do no more than draw.

        They need neither diffusers nor transformers, which take longer to import than a drawing.
        """
        return self._load(checkpoint, steps, outline=outline, lean=True)

    def _load(
        self, checkpoint: Checkpoint, steps: int | None, *, outline: bool, lean: bool
    ) -> Bundle:
        contract = checkpoint.contract_for(steps)
        single = None
        if not checkpoint.is_folder and (contract.role == "teacher" or checkpoint.is_whole):
            single = find_single_file(checkpoint.file)
        folder = _folder_of(checkpoint, contract, single)
        source = single or FolderFiles(folder.path)
        weights: Weights = Outline(source) if outline else source
        student = None
        if contract.role == "student" and isinstance(weights, FolderFiles):
            # A folder may also be a student's own, with its weights in the folder itself.
            student = folder.students.get(contract.steps) if checkpoint.is_folder else checkpoint
        codec = load_codec(folder.path, weights, contract=contract, lean=lean)
        if not outline:
            codec = with_own_decoder(codec, checkpoint, contract)
        return Bundle(
            denoiser=Denoiser(
                SdxlUnet(_load_unet(folder.path, weights, student, contract, lean=lean)),
                load_schedule(folder.path, contract),
                contract.prediction_type,
            ),
            codec=codec,
            text=load_text(folder.path, weights, lean=lean),
            contract=contract,
            students=tuple(sorted(folder.students, reverse=True)),
            origin=(checkpoint.name,),
        )

    def save(self, bundle: Bundle, folder: Path) -> None:
        """Write a model as a diffusers folder of fp16 weights, with its contract.

        Every SDXL pipeline loads it. Raises ModelError for a bundle with parts that are not SDXL's.
        """
        text = text_encoders(bundle)
        tokenizer, tokenizer_2 = text.tokenizers_to_save()
        networks = {**bundle.parts, "vae": autoencoder(bundle)}
        from diffusers import StableDiffusionXLPipeline

        with quiet_transformers():
            pipeline = StableDiffusionXLPipeline(
                **{name: in_half_precision(network) for name, network in networks.items()},
                tokenizer=tokenizer,
                tokenizer_2=tokenizer_2,
                scheduler=diffusers_scheduler(bundle.contract),
                force_zeros_for_empty_prompt=text.zeros_for_empty,
                add_watermarker=False,
            )
            pipeline.save_pretrained(folder)
        clean_configs(folder)
        (folder / CONTRACT_FILE).write_text(bundle.contract.to_json())
        save_own_decoder(bundle, folder)

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        """Write a student's UNet or LoRA in fp16 into the folder of its teacher.

        Arguments:
            weights: a UNet by diffusers' names, or a LoRA by PEFT's; the file of a LoRA has the
                names that diffusers' `load_lora_weights` reads.
            contract: the student's, which goes into the metadata; with a `lora_rank` for a LoRA.
            folder: the teacher's model folder.

        Returns the file.
        """
        path = student_path(contract, folder)
        if contract.lora_rank is not None:
            weights = {f"{PREFIX}{key}": value for key, value in weights.items()}
        with write_atomically(path) as file:
            file.write(save(halved(weights), contract.to_metadata()))
        return path


def diffusers_scheduler(contract: Contract) -> Any:
    """Return the scheduler with which diffusers samples as a contract says."""
    import diffusers

    name, settings = scheduler_settings(contract.schedule)
    if not isinstance(contract.schedule, RectifiedFlowSpec):
        settings["prediction_type"] = DIFFUSERS_NAMES[contract.prediction_type]
    if contract.sampler == "renoise" and isinstance(contract.schedule, VariancePreservingSpec):
        # The times have no place in its config: whoever samples gives them.
        name = "LCMScheduler"
        del settings["timestep_spacing"]
    return getattr(diffusers, name)(**settings)


def is_sdxl(contract: Contract) -> bool:
    """Tell whether a contract is that of a model of SDXL's family."""
    return contract.family == SdxlFamily.name


def text_encoders(bundle: Bundle) -> TextEncoders:
    """Return SDXL's text encoders of a bundle; raises ModelError if it has others."""
    if not isinstance(bundle.text, TextEncoders):
        raise ModelError(_foreign(bundle, bundle.text))
    return bundle.text


def autoencoder(bundle: Bundle) -> nn.Module:
    """Return SDXL's autoencoder of a bundle; raises ModelError if it has another codec."""
    if not isinstance(bundle.codec, ImageCodec):
        raise ModelError(_foreign(bundle, bundle.codec))
    vae: nn.Module = bundle.codec.vae
    return vae


def _foreign(bundle: Bundle, part: object) -> str:
    return (
        f"{bundle.contract.name} has {type(part).__name__}, which is no part of SDXL. Save it "
        "with its own family (twostep.models.families)."
    )


def _folder_of(checkpoint: Checkpoint, contract: Contract, single: SingleFile | None) -> Checkpoint:
    """Return the folder with the configs of a model, and the parts that a student leaves out."""
    if checkpoint.is_folder:
        return checkpoint
    path = base_folder(checkpoint.path, contract) if single is None else single.folder
    return look_at_folder(path, known=(checkpoint,))


def _load_unet(
    folder: Path,
    weights: Weights,
    student: Checkpoint | None,
    contract: Contract,
    *,
    lean: bool,
) -> Any:
    """Load the UNet of a model, or of its student."""
    if student is None:
        return load_network(folder, "unet", weights, lean=lean)
    if contract.lora_rank is None:
        return load_network(folder, "unet", SingleFile(student.file, folder), lean=lean)
    network = load_network(folder, "unet", weights, lean=lean)
    parts = {"unet": network}
    merge_lora(read_lora(student, parts, alpha=contract.lora_alpha), parts)
    return network


def base_folder(path: Path, contract: Contract) -> Path:
    """Return the folder with the parts that a student's file leaves out.

    Arguments:
        path: the student's file, which may lie in the folder `students` of its model, or among the
            snapshots of a run beside its `model`.
        contract: what the file says of itself.

    Raises ModelError if the model is neither there nor built in, or the file is a LoRA that goes
    on a student.
    """
    if goes_on_a_student(contract):
        raise ModelError(
            f"{path} is a LoRA that goes on {contract.base}. Load that, and this with it "
            f"(--lora {path})."
        )
    folder = model_of_student(path, contract.base)
    if folder is not None:
        return folder
    if contract.base == SDXL.base:
        parts = ["vae", "text_encoder*"]
        if contract.lora_rank is not None:
            parts.append("unet")
        return fetch(SDXL_BASE, only=(*CONFIGS, *(f"{part}/*.fp16.safetensors" for part in parts)))
    raise ModelError(
        f"{path} holds only the UNet of a student of {contract.base}, and {contract.base} is not "
        "built in. Put it into the folder `students` of that model."
    )


def embed_no_guidance(network: Any) -> None:
    """Mark a UNet as one whose guidance is distilled in, so that diffusers' pipelines never guide.

    They see it by an embedding of the guidance scale, which here consists of zeros.
    """
    network.register_to_config(time_cond_proj_dim=256)
    width = network.time_embedding.linear_1.in_features
    network.time_embedding.cond_proj = nn.Linear(256, width, bias=False)
    nn.init.zeros_(network.time_embedding.cond_proj.weight)


def clean_configs(folder: Path) -> None:
    """Remove from configs where the parts were loaded from, and what loading would warn of."""
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


def in_half_precision(network: nn.Module) -> Any:
    """Return a copy in float16 with the usual layout of memory."""
    halved = copy.deepcopy(network).half()
    return halved.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
