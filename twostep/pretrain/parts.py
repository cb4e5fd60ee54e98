"""Which recipe trains which part of the nano model, and where the part lies when it is trained.

A recipe says in `part` what it trains; every part has the same signature, so that the caller need not know them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twostep import __version__
from twostep.data.emoji import load_emoji
from twostep.data.latents import find_latents
from twostep.models.bundle import Bundle, load_codec, load_text, save_bundle, save_codec, save_text
from twostep.models.nano import teacher_contract
from twostep.pretrain.autoencoder import VaeSettings, train_vae
from twostep.pretrain.teacher import TeacherSettings, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.runs.folder import RunFolder
from twostep.runs.progress import OnProgress, spoken
from twostep.runs.recipe import load_recipe

TrainPart = Callable[[str, list[str], Path, Path, OnProgress], None]
"""(recipe, overrides, run folder, emoji set, progress): trains, and writes `model` into the run's folder."""


def train_vae_part(recipe: str, override: list[str], out: Path, emoji: Path, advance: OnProgress) -> None:
    """Train the autoencoder."""
    settings = load_recipe(recipe, VaeSettings, override)
    tell = _counter(advance, settings.loop.iterations)
    save_codec(train_vae(load_emoji(emoji), settings, RunFolder(out, settings), on_iteration=tell), out / "model")


def train_text_part(recipe: str, override: list[str], out: Path, emoji: Path, advance: OnProgress) -> None:
    """Train both text encoders."""
    settings = load_recipe(recipe, TextSettings, override)
    tell = _counter(advance, settings.loop.iterations)
    save_text(train_text(load_emoji(emoji), settings, RunFolder(out, settings), on_iteration=tell), out / "model")


def train_teacher_part(recipe: str, override: list[str], out: Path, emoji: Path, advance: OnProgress) -> None:
    """Train the denoiser, and write the whole teacher with every checkpoint."""
    settings = load_recipe(recipe, TeacherSettings, override)
    folder = RunFolder(out, settings)
    codec, text = load_codec(settings.autoencoder), load_text(settings.text_encoders)
    latents = find_latents(
        out / "latents.safetensors",
        emoji,
        codec,
        variants=settings.variants,
        on_variant=lambda done, total: advance(done, total, "latents"),
    )
    contract = teacher_contract("nano", Path(recipe).stem, __version__, settings.guidance)
    train_teacher(
        latents,
        text,
        settings,
        folder,
        on_iteration=_counter(advance, settings.loop.iterations),
        on_checkpoint=lambda _, denoiser: save_bundle(Bundle(denoiser, codec, text, contract), out / "model"),
    )


PARTS: dict[str, TrainPart] = {"vae": train_vae_part, "text": train_text_part, "teacher": train_teacher_part}


def _counter(advance: OnProgress, total: int) -> Callable[[int, dict[str, float]], None]:
    return lambda done, figures: advance(done, total, spoken(figures))
