"""The parts of a built-in model: what trains each by its recipe, and what it leaves in the run's
folder.

A recipe's key `part` says which part it trains; the recipes of the package are in `recipes/`.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel
from safetensors.torch import save
from torch import Tensor

from twostep import __version__
from twostep.contract import Contract
from twostep.files import write_atomically
from twostep.formats.folders import weights_folder
from twostep.media.image import ImageCodec
from twostep.media.patches import psnr
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.models.sdxl import text_encoders
from twostep.models.sdxl_networks import load_codec, load_text
from twostep.networks.adapters import PREFIX
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.art_of_sizes import find_drawings
from twostep.pretrain.captions import Omission
from twostep.pretrain.control import ControlSettings, train_control
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.encoded_scenes import make_encoded_scenes
from twostep.pretrain.joint import JointSettings, train_joint
from twostep.pretrain.judge import JudgeSettings, train_judge
from twostep.pretrain.latents import LatentCache, find_latents
from twostep.pretrain.loop import PartSettings
from twostep.pretrain.model import build_text_encoders, teacher_contract
from twostep.pretrain.motion import MotionSettings, new_motion_teacher, train_motion
from twostep.pretrain.scene_captions import scene_corpus
from twostep.pretrain.scenes import compose, random_scenes
from twostep.pretrain.sheets import draw_samples, write_sheet
from twostep.pretrain.sizes import ModelSize, find_size
from twostep.pretrain.sound import (
    SoundSettings,
    find_source,
    fit_codec,
    new_sound_teacher,
    sound_cache,
    train_sound_teacher,
)
from twostep.pretrain.sound_judge import (
    SOUND_JUDGE_FILE,
    SoundJudgeSettings,
    train_sound_judge,
)
from twostep.pretrain.style import StyleSettings, style_latents, style_prompts, train_style
from twostep.pretrain.teacher import TeacherSettings, TuneSettings, new_denoiser, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.pretrain.vae import VaeSettings, train_vae
from twostep.training.device import find_device
from twostep.training.loop import LoopSettings, OnIteration
from twostep.training.processes import wait, world
from twostep.training.recipe import RecipeError, load_recipe, recipe_text
from twostep.training.run_folder import RunFolder

RECIPES = Path(__file__).with_name("recipes")
"""The recipes of the package."""

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


NO_DRAWINGS = DrawingSet(torch.zeros(0, 0, 4, 0, 0, dtype=torch.uint8), concepts=(), styles=())
"""What parts get that do not learn from drawings."""


@dataclass(frozen=True)
class PartRun:
    """What one training of a part has beside its settings.

    Attributes:
        name: of the recipe, which a teacher's contract keeps.
        drawings: what it learns from.
        out: the run's folder.
        advance: shows how far it is.
    """

    name: str
    drawings: DrawingSet
    out: Path
    advance: OnProgress

    def show(self, loop: LoopSettings) -> OnIteration:
        """Return what shows an iteration's figures."""

        def on_iteration(num_done: int, figures: dict[str, float]) -> None:
            words = " ".join(f"{key} {value:.3g}" for key, value in figures.items())
            self.advance(num_done, loop.iterations, words)

        return on_iteration

    def show_latents(self, num_done: int, total: int) -> None:
        """Show how many variants of the drawings have been encoded."""
        self.advance(num_done, total, "latents")


@dataclass(frozen=True)
class Part:
    """A recipe that was read, and what trains by it."""

    name: str
    settings: PartSettings
    _train: Callable[[Any, PartRun], Path]

    @property
    def device(self) -> torch.device:
        """The device that the recipe names."""
        return find_device(self.settings.device)

    def find_drawings(self, folder: Path | None = None) -> DrawingSet:
        """Load the drawings of a folder, or those of the recipe's size that are in the package.

        Parts that learn from something else get none; RecipeError for a folder that they would not
        look at.
        """
        if not self.settings.learns_from_drawings:
            if folder is not None:
                raise RecipeError(
                    f"{self.name} does not learn from drawings: leave the folder {folder} out."
                )
            return NO_DRAWINGS
        return find_drawings(find_size(self.settings.size), folder)

    def train(
        self,
        drawings: DrawingSet,
        out: Path,
        advance: OnProgress = lambda done, total, words: None,
    ) -> Path:
        """Train the part and return what was written; the same call again resumes.

        Of several processes (`training.processes.joined`) each must call it.

        Raises:
            RunError: the folder holds a run of another recipe.
            TrainingError: a loss is not finite.
        """
        return self._train(self.settings, PartRun(self.name, drawings, out, advance))


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_part(recipe: str | Path, overrides: Sequence[str] = ()) -> Part:
    """Read the recipe of a part.

    Args:
        recipe: a name that `recipe_names` lists, or the path of a TOML file.
        overrides: `key.path=value`, other values for keys of the recipe.

    Raises:
        RecipeError: there is no such recipe, or it is not accepted.
    """
    path = find_part_recipe(recipe)
    try:
        kind = tomllib.loads(recipe_text(path)).get("part")
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    if kind not in _PARTS:
        raise RecipeError(f'{path}: part = "{kind}" is none of {", ".join(_PARTS)}.')
    settings_type, train = _PARTS[kind]
    return Part(path.stem, load_recipe(path, settings_type, overrides), train)


def find_part_recipe(name: str | Path) -> Path:
    """Return the file of a recipe given by name or path; RecipeError lists the names there are."""
    for path in (RECIPES / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    raise RecipeError(
        f"There is no recipe '{name}'. Built in: {', '.join(recipe_names())}; "
        "or give the path of a TOML file."
    )


_NUM_LOOKED_AT = 8
"""Pictures that an autoencoder's sheets show, each above what it made of it."""


def _train_vae(settings: VaeSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    size = find_size(settings.size)
    if size.learns_from == "drawings":
        codec = train_vae(run.drawings, settings, folder, on_iteration=run.show(settings.loop))
        _save_vae(codec.vae, run)
        return run.out / "model"
    # Never seen in training, whose scenes begin at number 0.
    scenes = random_scenes(
        len(run.drawings.concepts),
        len(run.drawings.styles),
        count=_NUM_LOOKED_AT,
        seed=settings.loop.seed,
        first=settings.num_pictures,
    )
    pictures = compose(scenes, run.drawings.drawings, size.pixels)

    def show(iteration: int, vae: AutoencoderTiny) -> None:
        if not world().is_first:
            return
        codec = ImageCodec(vae)
        made = codec.decode(codec.encode(pictures.to(vae.device))).cpu()
        _write_sheet(torch.stack([pictures, made]), f"vae-{iteration:06d}.png", run, folder)
        near = mean(psnr(a, b).item() for a, b in zip(made, pictures, strict=True))
        folder.log(part="vae", iteration=iteration, psnr=near)
        _save_vae(vae, run)

    train_vae(
        run.drawings, settings, folder, on_iteration=run.show(settings.loop), on_checkpoint=show
    )
    return run.out / "model"


def _save_vae(vae: AutoencoderTiny, run: PartRun) -> None:
    if world().is_first:
        with weights_folder(run.out / "model" / "vae") as folder:
            vae.save_pretrained(folder)


def _write_sheet(rows: Tensor, name: str, run: PartRun, folder: RunFolder) -> None:
    """Write a sheet of pictures among the run's samples, and say so in its log."""
    part, _, number = name.removesuffix(".png").rpartition("-")
    write_sheet(rows, run.out / "samples" / name)
    folder.log(part=part, iteration=int(number), picture=f"samples/{name}")


def _train_text(settings: TextSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    text = train_text(run.drawings, settings, folder, on_iteration=run.show(settings.loop))
    if world().is_first:
        tokenizers = text.tokenizers_to_save()
        with weights_folder(run.out / "model") as model:
            for number, suffix in enumerate(("", "_2")):
                tokenizers[number].save_pretrained(model / f"tokenizer{suffix}")
                text.encoders[number].save_pretrained(model / f"text_encoder{suffix}")
    return run.out / "model"


def _train_teacher(settings: TeacherSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    size = find_size(settings.size)
    codec = load_codec(settings.autoencoder)
    text = load_text(settings.text_encoders)
    denoiser = new_denoiser(size, settings.loop.seed)
    contract = _new_contract(size, run, settings.guidance)
    return _fit_teacher(run, Bundle(denoiser, codec, text, contract), settings, folder)


def _new_contract(size: ModelSize, run: PartRun, guidance: float) -> Contract:
    """Return the contract of a teacher that a run makes from nothing."""
    return teacher_contract(
        size, name=size.name, recipe=run.name, version=__version__, guidance=guidance
    )


def _train_joint(settings: JointSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    size = find_size(settings.size)
    device = find_device(settings.device)
    codec = load_codec(settings.autoencoder)
    denoiser = new_denoiser(size, settings.loop.seed)
    text = build_text_encoders(size, scene_corpus(run.drawings.concepts))
    contract = _new_contract(size, run, settings.guidance)
    teacher = Bundle(denoiser, codec, text, contract).to(device)
    scenes = make_encoded_scenes(
        run.drawings,
        teacher.codec,
        text_encoders(teacher).tokenizers[0],
        pixels=size.pixels,
        count=settings.scenes,
        captions=settings.captions,
        seed=settings.loop.seed,
        device=device,
        on_scene=lambda done, total: run.advance(done, total, "scenes"),
    )

    train_joint(
        teacher,
        scenes,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=_writer(teacher, settings, run, folder),
    )
    return run.out / "model"


def _writer(
    teacher: Bundle,
    settings: JointSettings | MotionSettings | SoundSettings,
    run: PartRun,
    folder: RunFolder,
) -> Callable[[int], None]:
    """Return what writes a teacher at a checkpoint, and a sheet of its samples."""

    def write(iteration: int) -> None:
        if not world().is_first:
            return
        save_bundle(teacher, run.out / "model")
        with settings.loop.autocast(teacher.denoiser.device.type):
            drawn = draw_samples(teacher, settings.sample_prompts, settings.sample_seeds)
        _write_sheet(drawn, f"{settings.part}-{iteration:06d}.png", run, folder)

    return write


def _tune_teacher(settings: TuneSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    teacher = load_bundle(settings.model)
    contract = replace(
        teacher.contract,
        name=settings.name,
        base=settings.name,
        recipe=run.name,
        version=__version__,
    )
    return _fit_teacher(run, replace(teacher, contract=contract), settings, folder)


def _fit_teacher(
    run: PartRun, teacher: Bundle, settings: TeacherSettings | TuneSettings, folder: RunFolder
) -> Path:
    """Train a teacher's denoiser, and write the whole teacher with every checkpoint."""
    pixels = teacher.contract.sizes[0][0]
    latents: LatentCache = find_latents(
        run.out / "latents.safetensors",
        lambda: run.drawings,
        teacher.codec,
        pixels=pixels,
        variants=settings.variants,
        on_variant=run.show_latents,
    )
    if settings.part == "tune":
        # The new style goes without saying: whatever the tuned teacher draws is in it.
        latents = replace(latents, omission=Omission(style=1.0))
    teacher = teacher.to(find_device(settings.device))

    def write(iteration: int, denoiser: Denoiser) -> None:
        if world().is_first:
            save_bundle(replace(teacher, denoiser=denoiser), run.out / "model")

    train_teacher(
        teacher.denoiser,
        latents,
        teacher.text,
        settings=settings,
        folder=folder,
        pixels=pixels,
        on_iteration=run.show(settings.loop),
        on_checkpoint=write,
    )
    return run.out / "model"


def _train_control(settings: ControlSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    # The codec stays on the CPU, where drawings are composed; scenes are on the device.
    bundle = load_bundle(settings.model)
    device = find_device(settings.device)
    bundle.denoiser.network.to(device)
    for encoder in bundle.text.networks.values():
        encoder.to(device)
    if find_size(settings.size).learns_from == "scenes":
        bundle = bundle.to(device)

    def write(iteration: int, control: ControlNetModel) -> None:
        if world().is_first:
            with weights_folder(run.out / "model") as model:
                copy.deepcopy(control).half().save_pretrained(model)

    train_control(
        run.drawings,
        bundle,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=write,
    )
    return run.out / "model"


def _train_motion(settings: MotionSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    device = find_device(settings.device)
    teacher = new_motion_teacher(settings, recipe=run.name, version=__version__).to(device)

    train_motion(
        run.drawings,
        teacher,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=_writer(teacher, settings, run, folder),
    )
    return run.out / "model"


def _train_sound(settings: SoundSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    teacher = new_sound_teacher(settings, run.name)

    def show_notes(num_done: int, total: int) -> None:
        run.advance(num_done, total, "notes")

    cached = sound_cache(settings, run.out)
    if world().is_first and not cached.exists():
        fit_codec(teacher, settings, show_notes)
        save_bundle(teacher, run.out / "model")
    wait()
    if cached.exists() or not world().is_first:
        # Cached latents are those of the codec that was fitted before them.
        teacher = replace(teacher, codec=load_bundle(run.out / "model").codec)
    source = find_source(teacher, settings, run.out, show_notes)
    teacher = teacher.to(find_device(settings.device))

    train_sound_teacher(
        teacher,
        source,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=_writer(teacher, settings, run, folder),
    )
    return run.out / "model"


def _train_sound_judge(settings: SoundJudgeSettings, run: PartRun) -> Path:
    train_sound_judge(settings, run.out, run.show(settings.loop))
    return run.out / SOUND_JUDGE_FILE


def _train_judge(settings: JudgeSettings, run: PartRun) -> Path:
    train_judge(settings, run.drawings, run.out, run.show(settings.loop))
    return run.out / "judge.safetensors"


def _train_style(settings: StyleSettings, run: PartRun) -> Path:
    folder = RunFolder(run.out, settings)
    settings = folder.settled(settings)
    bundle = load_bundle(settings.model)
    latents = style_latents(run.drawings, bundle, settings, on_variant=run.show_latents)
    bundle = bundle.to(find_device(settings.device))
    lora = train_style(latents, bundle, settings, folder, on_iteration=run.show(settings.loop))
    path = run.out / f"{settings.style}.safetensors"
    if world().is_first:
        tensors = {
            f"{PREFIX}{key}": value.cpu().contiguous() for key, value in lora.state_dict().items()
        }
        with write_atomically(path) as file:
            file.write(save(tensors))
        prompts = style_prompts(latents, settings.loop.seed)
        with write_atomically(run.out / "prompts.txt") as file:
            file.write("\n".join(prompts).encode())
    return path


_PARTS: dict[str, tuple[type[PartSettings], Callable[[Any, PartRun], Path]]] = {
    "vae": (VaeSettings, _train_vae),
    "text": (TextSettings, _train_text),
    "teacher": (TeacherSettings, _train_teacher),
    "joint": (JointSettings, _train_joint),
    "tune": (TuneSettings, _tune_teacher),
    "control": (ControlSettings, _train_control),
    "style": (StyleSettings, _train_style),
    "judge": (JudgeSettings, _train_judge),
    "motion": (MotionSettings, _train_motion),
    "sound": (SoundSettings, _train_sound),
    "sound-judge": (SoundJudgeSettings, _train_sound_judge),
}
"""Part -> the settings of its recipe, and what trains it and returns what it wrote."""
