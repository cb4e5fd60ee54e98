"""The parts of a built-in model, by the names of their recipes: what trains each, and what it
leaves in the run's folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twostep import __version__
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.models.sdxl import text_encoders
from twostep.models.sdxl_networks import load_codec, load_text
from twostep.pretrain.captions import Omission
from twostep.pretrain.control import SilhouetteSettings, train_silhouette
from twostep.pretrain.drawings import EmojiSet
from twostep.pretrain.judge import JudgeSettings, train_judge
from twostep.pretrain.latents import find_latents
from twostep.pretrain.model import teacher_contract
from twostep.pretrain.teacher import TeacherSettings, TuneSettings, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.pretrain.vae import VaeSettings, train_vae
from twostep.training.loop import LoopSettings, OnIteration
from twostep.training.recipe import RecipeError, load_recipe
from twostep.training.run_folder import RunFolder

RECIPES = Path(__file__).with_name("recipes")

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


@dataclass(frozen=True)
class PartRun:
    """One training of a part: its recipe with overrides, its folder, and what it learns from."""

    recipe: Path
    overrides: list[str]
    out: Path
    drawings: EmojiSet
    device: torch.device
    advance: OnProgress

    @property
    def name(self) -> str:
        """The recipe's name, which a teacher's contract keeps."""
        return self.recipe.stem

    def show(self, loop: LoopSettings) -> OnIteration:
        """Return what shows an iteration's figures."""

        def on_iteration(done: int, figures: dict[str, float]) -> None:
            words = " ".join(f"{key} {value:.3f}" for key, value in figures.items())
            self.advance(done, loop.iterations, words)

        return on_iteration

    def show_latents(self, done: int, total: int) -> None:
        """Show how many variants of the drawings have been encoded."""
        self.advance(done, total, "latents")


def part_names() -> list[str]:
    """Return the names of the parts that can be trained."""
    return list(_PARTS)


def train_part(
    name: str,
    drawings: EmojiSet,
    out: Path,
    *,
    device: torch.device,
    overrides: list[str] | None = None,
    advance: OnProgress = lambda done, total, words: None,
) -> Path:
    """Train a part by its recipe and return what was written.

    The same call again resumes. Raises RecipeError for a name that is no part's.
    """
    if name not in _PARTS:
        raise RecipeError(f"'{name}' is none of {', '.join(_PARTS)}; give one of these.")
    run = PartRun(RECIPES / f"{name}.toml", overrides or [], out, drawings, device, advance)
    return _PARTS[name](run)


def _train_vae(run: PartRun) -> Path:
    settings = load_recipe(run.recipe, VaeSettings, run.overrides)
    folder = RunFolder(run.out, settings)
    codec = train_vae(run.drawings, settings, folder, on_iteration=run.show(settings.loop))
    codec.vae.save_pretrained(run.out / "model" / "vae")
    return run.out / "model"


def _train_text(run: PartRun) -> Path:
    settings = load_recipe(run.recipe, TextSettings, run.overrides)
    folder = RunFolder(run.out, settings)
    text = train_text(run.drawings, settings, folder, on_iteration=run.show(settings.loop))
    for suffix, tokenizer, encoder in zip(("", "_2"), text.tokenizers, text.encoders, strict=True):
        tokenizer.save_pretrained(run.out / "model" / f"tokenizer{suffix}")
        encoder.save_pretrained(run.out / "model" / f"text_encoder{suffix}")
    return run.out / "model"


def _train_teacher(run: PartRun) -> Path:
    settings = load_recipe(run.recipe, TeacherSettings, run.overrides)
    folder = RunFolder(run.out, settings)
    codec = load_codec(settings.autoencoder)
    text = load_text(settings.text_encoders)
    latents = find_latents(
        run.out / "latents.safetensors",
        run.drawings,
        codec,
        variants=settings.variants,
        on_variant=run.show_latents,
    )
    contract = teacher_contract("nano", run.name, __version__, settings.guidance)
    train_teacher(
        latents,
        text,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=lambda _, denoiser: save_bundle(
            Bundle(denoiser, codec, text, contract), run.out / "model"
        ),
    )
    return run.out / "model"


def _tune_teacher(run: PartRun) -> Path:
    """Tune a teacher to other drawings, whose style no caption names."""
    settings = load_recipe(run.recipe, TuneSettings, run.overrides)
    folder = RunFolder(run.out, settings)
    bundle = load_bundle(settings.model)
    latents = find_latents(
        run.out / "latents.safetensors",
        run.drawings,
        bundle.codec,
        variants=settings.variants,
        on_variant=run.show_latents,
    )
    bundle = bundle.to(run.device)
    contract = teacher_contract(settings.name, run.name, __version__, bundle.contract.guidance)
    train_teacher(
        replace(latents, omission=Omission(style=1.0)),
        text_encoders(bundle),
        settings,
        folder,
        start=bundle.denoiser,
        on_iteration=run.show(settings.loop),
        on_checkpoint=lambda _, denoiser: save_bundle(
            replace(bundle, contract=contract), run.out / "model"
        ),
    )
    return run.out / "model"


def _train_silhouette(run: PartRun) -> Path:
    settings = load_recipe(run.recipe, SilhouetteSettings, run.overrides)
    folder = RunFolder(run.out, settings)
    bundle = load_bundle(settings.model)
    bundle.denoiser.network.to(run.device)
    for encoder in bundle.text.networks.values():
        encoder.to(run.device)
    train_silhouette(
        run.drawings,
        bundle,
        settings,
        folder,
        on_iteration=run.show(settings.loop),
        on_checkpoint=lambda _, control: (
            copy.deepcopy(control).half().save_pretrained(run.out / "model")
        ),
    )
    return run.out / "model"


def _train_judge(run: PartRun) -> Path:
    settings = load_recipe(run.recipe, JudgeSettings, run.overrides)
    train_judge(settings, run.drawings, run.out, run.show(settings.loop))
    return run.out / "judge.safetensors"


_PARTS: dict[str, Callable[[PartRun], Path]] = {
    "nano-vae": _train_vae,
    "nano-text": _train_text,
    "nano-teacher": _train_teacher,
    "nano-openmoji": _tune_teacher,
    "nano-silhouette": _train_silhouette,
    "nano-judge": _train_judge,
}
