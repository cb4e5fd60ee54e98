"""The family of motion modules: clips drawn by a picture model with a motion module in its UNet.

The picture models are of SDXL's family or of Stable Diffusion 1.5's.

A model folder has the sampling contract in `twostep.json`; `motion.json`, which names the picture
models and says how long clips are; and the motion module in `motion_adapter`, a folder that
diffusers' `MotionAdapter.from_pretrained` reads. Students lie in `students/` as motion modules by
diffusers' names, as AnimateDiff-Lightning's files have them. The picture models are not copied into
the folder: they are loaded by their own names. `domain_adapter.safetensors`, where there is one, is
a LoRA that is merged into them first, teacher and students alike; its names are diffusers'.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from twostep import __version__
from twostep.contract import Contract, VariancePreservingSpec
from twostep.diffusion import make_schedule
from twostep.evaluate.motions import MOTION_WORDS
from twostep.files import write_atomically
from twostep.formats.checkpoint import Checkpoint, look_at_folder, resolve, student_path
from twostep.formats.folders import weights_folder
from twostep.formats.header import read_header
from twostep.formats.locate import CONFIGS, CONTRACT_FILE, ModelError, read_json
from twostep.formats.lora_files import merge_lora, read_lora, write_lora
from twostep.formats.lora_kinds import WeightChange
from twostep.formats.motion_files import MotionConfig, MotionError, our_names, to_diffusers
from twostep.formats.single_file import account, read_tensors
from twostep.media.image import ImageCodec
from twostep.media.video import VideoCodec
from twostep.models.bundle import Bundle
from twostep.models.sd15 import is_sd15, load_sd15
from twostep.models.sdxl import SdxlFamily, base_folder, is_sdxl
from twostep.networks.adapters import PREFIX
from twostep.networks.denoiser import Denoiser
from twostep.networks.domain_adapter import DomainAdapter
from twostep.networks.lean import LeanUnet
from twostep.networks.motion import MotionModule, MotionUnet
from twostep.training.halves import halved

SETTINGS_FILE = "motion.json"
ADAPTER = "motion_adapter"
DOMAIN_ADAPTER = "domain_adapter.safetensors"
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


class ClipSettings(BaseModel):
    """What `motion.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bases: tuple[str, ...] = Field(
        min_length=1,
        description="picture models: built-in names, hub ids, or paths, from the folder or from "
        "where the process is; the first draws, and its text encoders and autoencoder are used",
    )
    frames: int = Field(16, ge=1, description="of a clip, where a request does not say it")
    frames_per_second: float = Field(8.0, gt=0, description="of the clips that are written")


class MotionFamily:
    """Loads and saves motion modules on picture models of SDXL's family."""

    name = "motion"

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model, or its student of so many steps, frozen and in float32.

        Arguments:
            checkpoint: a model folder, or a student's file in its folder.
            steps: picks the student; None is the teacher.
            outline: read configs alone, and leave the weights as they are initialised.

        Raises ModelError if a part is missing or damaged, MotionError if the motion module does not
        fit the picture model.
        """
        contract = checkpoint.contract_for(steps)
        folder = checkpoint
        if not checkpoint.is_folder:
            path = base_folder(checkpoint.path, contract)
            folder = look_at_folder(path, known=(checkpoint,))
        settings = read_settings(folder.path)
        pictures = load_pictures(settings.bases, folder.path, outline=outline)
        config = MotionConfig.from_diffusers(read_json(folder.path / ADAPTER / _CONFIG))
        module = folder.path / ADAPTER / _WEIGHTS
        student = None
        if contract.role == "student":
            # An exported student is a folder of its own, with its module in the teacher's place.
            student = folder.students.get(contract.steps) if checkpoint.is_folder else checkpoint
        if student is not None and contract.lora_rank is None:
            module = student.path
        network = _load_module(config, None if outline else module)
        if student is not None and contract.lora_rank is not None and not outline:
            parts = {"unet": network}
            merge_lora(read_lora(student, parts, alpha=contract.lora_alpha), parts)
        adapter_file = folder.path / DOMAIN_ADAPTER
        has_adapter = adapter_file.exists() and not outline
        bundle = with_motion(
            pictures,
            network,
            contract,
            frames=settings.frames,
            frames_per_second=settings.frames_per_second,
            adapter=_merged(adapter_file, pictures) if has_adapter else None,
        )
        students = tuple(sorted(folder.students, reverse=True))
        return replace(bundle, students=students, origin=(checkpoint.name,))

    def save(self, bundle: Bundle, folder: Path) -> None:
        """Write a model folder; the picture models are named there, and not written.

        Raises ModelError for a bundle that is no motion module on picture models.
        """
        backbone = bundle.denoiser.backbone
        codec = bundle.codec
        if not isinstance(backbone, MotionUnet) or not isinstance(codec, VideoCodec):
            raise ModelError(
                f"{bundle.contract.name} is no motion module on picture models, which the family "
                f"{self.name!r} writes. Save it with its own family."
            )
        adapter = folder / ADAPTER
        adapter.mkdir(parents=True, exist_ok=True)
        config = backbone.network.shape
        settings = ClipSettings(
            bases=tuple(_spelled(name, folder) for name in backbone.names),
            frames=codec.length,
            frames_per_second=codec.frames_per_second,
        )
        # The positions are added afterwards: they stay in full precision.
        weights = to_diffusers(halved(backbone.network.state_dict()), config)
        (adapter / _CONFIG).write_text(json.dumps(config.to_diffusers(), indent=2))
        with write_atomically(adapter / _WEIGHTS) as file:
            file.write(save(weights, {"format": "pt"}))
        if backbone.adapter is not None:
            unets: dict[str, nn.Module] = {"unet": backbone.bases[0]}
            tensors, metadata = write_lora(backbone.adapter.changes(), unets, "peft")
            with write_atomically(folder / DOMAIN_ADAPTER) as file:
                file.write(save(halved(tensors), {"format": "pt", **metadata}))
        (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2))
        (folder / CONTRACT_FILE).write_text(bundle.contract.to_json())

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        """Write a student's motion module, or its LoRA on one, in fp16 into its teacher's folder.

        Returns the file. diffusers reads a module as it reads AnimateDiff-Lightning's, and a LoRA,
        whose weights are by PEFT's names, by `load_lora_weights` as any motion LoRA.
        """
        if contract.lora_rank is None:
            config = MotionConfig.from_diffusers(read_json(folder / ADAPTER / _CONFIG))
            halves = to_diffusers(halved(weights), config)
        else:
            halves = halved({f"{PREFIX}{key}": value for key, value in weights.items()})
        path = student_path(contract, folder)
        with write_atomically(path) as file:
            file.write(save(halves, {"format": "pt", **contract.to_metadata()}))
        return path


def read_settings(folder: Path) -> ClipSettings:
    """Read `motion.json` of a model folder; ModelError where it is missing or damaged."""
    path = folder / SETTINGS_FILE
    try:
        return ClipSettings.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelError(f"{path}: {place}: {first['msg']}. Mend it by hand.") from error


def open_motion_lora(lora: Checkpoint, model: str | Path | None = None) -> dict[str, WeightChange]:
    """Read a LoRA on a motion module, by the module's layers.

    Arguments:
        lora: the file.
        model: a model of clips with these layers; the one that the file's contract names if not
            given.

    Raises ModelError if no model is known, or the file is of other layers.
    """
    contract = lora.carried
    if model is not None:
        folder = resolve(model).path
    elif contract is not None:
        folder = base_folder(lora.path, contract)
    else:
        raise ModelError(
            f"{lora.path} does not say which motion module it is for; give a model of clips with "
            "one of that kind as the base."
        )
    config = MotionConfig.from_diffusers(read_json(folder / ADAPTER / _CONFIG))
    parts: dict[str, nn.Module] = {"unet": _load_module(config, None)}
    return read_lora(lora, parts, alpha=None if contract is None else contract.lora_alpha)


def load_pictures(
    names: Sequence[str], folder: Path | None = None, *, outline: bool = False
) -> list[Bundle]:
    """Load the picture models that a motion module goes on, frozen and in float32.

    Arguments:
        names: built-in names, hub ids or paths.
        folder: from where relative paths are looked for first.
        outline: read configs alone, and leave the weights as they are initialised.

    Raises ModelError for what is no such model.
    """
    loaded = []
    for name in names:
        path = None if folder is None else folder / name
        found = path if path is not None and path.exists() else name
        checkpoint = resolve(found, only=CONFIGS if outline else None)
        if is_sd15(checkpoint):
            bundle = load_sd15(checkpoint, outline=outline)
        elif is_sdxl(checkpoint.contract):
            bundle = SdxlFamily().load_to_draw(checkpoint, outline=outline)
        else:
            raise ModelError(
                f"{name} is of the family {checkpoint.contract.family!r}; a motion module goes on "
                "a picture model of SDXL's, or of Stable Diffusion 1.5's."
            )
        picture_unet(bundle)
        loaded.append(replace(bundle, origin=(name,)))
    return loaded


def picture_unet(picture: Bundle) -> LeanUnet:
    """Return the UNet of a picture model; ModelError if it is of a kind that takes no motion."""
    unet = picture.denoiser.network
    if not isinstance(unet, LeanUnet):
        raise ModelError(
            f"{picture.contract.name} has a UNet of an unusual kind, which takes no motion module."
        )
    return unet


def with_motion(
    pictures: Sequence[Bundle],
    network: MotionModule,
    contract: Contract,
    *,
    frames: int = 16,
    frames_per_second: float = 8.0,
    adapter: DomainAdapter | None = None,
) -> Bundle:
    """Put a motion module on picture models.

    Arguments:
        pictures: as `load_pictures` returns them; the first draws, and its text encoders and
            autoencoder are used.
        network: the motion module.
        contract: how the clips are sampled; see `motion_contract`.
        frames: of a clip, where a request does not say it.
        frames_per_second: of what is written.
        adapter: that was added to the picture models, or is while it is trained.

    Raises MotionError if the module does not fit.
    """
    first = pictures[0]
    assert isinstance(first.codec, ImageCodec)
    unets = tuple(map(picture_unet, pictures))
    names = tuple(picture.origin[0] for picture in pictures)
    backbone = MotionUnet(network, unets, names, adapter)
    codec = VideoCodec(
        first.codec,
        length=min(frames, network.shape.max_frames),
        longest=network.shape.max_frames,
        frames_per_second=frames_per_second,
    )
    schedule = make_schedule(**asdict(contract.schedule))
    denoiser = Denoiser(backbone, schedule, contract.prediction_type)
    return Bundle(denoiser, codec, first.text, contract, learnt_words=MOTION_WORDS)


ANIMATEDIFF_NOISE = {
    (320, 640, 1280, 1280): VariancePreservingSpec(betas="linear"),
    (320, 640, 1280): VariancePreservingSpec(beta_end=0.02),
}
"""The noise that AnimateDiff's own modules were trained on, by the widths of their UNets.

ComfyUI calls the first "sqrt_linear (AnimateDiff)", the second "linear (AnimateDiff-SDXL)".
"""


def adopt_motion_module(
    file: str | Path,
    bases: Sequence[str],
    folder: str | Path,
    *,
    frames: int = 16,
    schedule: VariancePreservingSpec | None = None,
) -> Path:
    """Make a model of clips of somebody's motion module, a teacher to draw with and to distil.

    Arguments:
        file: a motion module by AnimateDiff's own or by diffusers' names, as .safetensors.
        bases: the picture models that it goes on; the first draws.
        folder: the model folder that is written.
        frames: of a clip, where a request does not say it.
        schedule: the noise that it was trained on; AnimateDiff's own if not given, and for other
            widths the picture model's.

    Returns the folder. Raises MotionError for what is no motion module, or one that does not fit,
    and ModelError for files that cannot be read.
    """
    path = Path(file)
    folder = Path(folder)
    header = read_header(path)
    weights = read_tensors(path, header.shapes)
    pictures = load_pictures(bases, outline=True)
    groups = MotionConfig.on(picture_unet(pictures[0]).config).groups
    config = MotionConfig.of_weights(weights, groups=groups)
    network = _load_module(config, path)
    contract = motion_contract(
        pictures[0].contract, folder.name, recipe=path.name, version=__version__
    )
    known = schedule or ANIMATEDIFF_NOISE.get(config.channels)
    contract = replace(contract, schedule=known or contract.schedule)
    bundle = with_motion(pictures, network, contract, frames=frames)
    with weights_folder(folder) as partial:
        MotionFamily().save(bundle, partial)
    return folder


def motion_contract(base: Contract, name: str, *, recipe: str, version: str) -> Contract:
    """Return the contract of a teacher of clips that is trained on a picture teacher."""
    return replace(
        base,
        name=name,
        base=name,
        family=MotionFamily.name,
        media="video",
        recipe=recipe,
        version=version,
    )


def _merged(file: Path, pictures: Sequence[Bundle]) -> DomainAdapter:
    """Merge a domain adapter into picture models; LoraError where it does not fit them."""
    unets = [picture_unet(picture) for picture in pictures]
    for unet in unets:
        changes = read_lora(file, {"unet": unet})
        merge_lora(changes, {"unet": unet})
    return DomainAdapter.of(changes)


def _load_module(config: MotionConfig, file: Path | None) -> MotionModule:
    """Return a motion module, frozen, with the weights of a file if one is given."""
    network = MotionModule(config)
    if file is not None:
        header = read_header(file)
        weights = our_names(read_tensors(file, header.shapes))
        found = MotionConfig.of_weights(weights, heads=config.heads, groups=config.groups)
        if (found.channels, found.layers) != (config.channels, config.layers):
            raise MotionError(
                f"{file} is a motion module for a UNet of {found}; this model has one of {config}. "
                "It was made for another family."
            )
        expected = network.state_dict()
        names = {key: key for key in expected}
        accounted = account(weights, expected, names, str(file))
        network.load_state_dict({key: value.float() for key, value in accounted.items()})
    return network.eval().requires_grad_(False)


def _spelled(name: str, folder: Path) -> str:
    """Return the name of a picture model as a folder elsewhere has to say it."""
    path = Path(name)
    if path.is_absolute() or not path.exists():
        return name
    return os.path.relpath(path, folder)
