"""The verb that makes a cache to train from, of a user's pictures or of prompts alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.train import progress_bar

if TYPE_CHECKING:
    from twostep.data.cache import CacheWriter
    from twostep.data.sources import Entry

_NUM_NAMED = 5
"""Skipped items that are printed with their reasons; more are counted."""


def cache(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of pictures with .txt captions, .jsonl, .tar shards (a pattern), "
            "hf:dataset; or a .txt file of prompts, one a line, whose pictures the teacher makes."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the cache; the same command again goes on there.")
    ],
    model: Annotated[
        str, typer.Option(help="The teacher: its autoencoder and text encoders are used.")
    ] = "nano",
    lora: Annotated[
        list[str] | None, typer.Option(help="Prompts alone: LoRAs for the teacher, file:weight.")
    ] = None,
    square: Annotated[
        bool, typer.Option(help="Cut everything square, as the paper did; else to the nearest.")
    ] = False,
    min_side: Annotated[
        int, typer.Option(min=0, help="Skip pictures with a side of fewer pixels.")
    ] = 0,
    min_sharpness: Annotated[
        float, typer.Option(min=0, help="Skip blurred ones: deviation of the Laplacian.")
    ] = 0.0,
    per_prompt: Annotated[int, typer.Option(min=1, help="Prompts alone: pictures of each.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Prompts alone: the teacher's steps.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1, help="Prompts alone: the teacher's guidance.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that are worked on at once.")
    ] = 8,
) -> None:
    """Encode pictures and captions, or let the teacher draw prompts, into shards to train from."""
    from twostep.data.encoding import cache_pictures, cache_prompts
    from twostep.data.sources import Demands
    from twostep.models.loading import load_with_loras

    prompts = _read_prompts(source)
    # Looked for before a model is loaded, which takes long.
    entries = iter(()) if prompts is not None else _found_entries(source)
    bundle = load_with_loras(model, lora or []).as_teacher()
    with progress_bar("cache") as advance:
        if prompts is not None:
            total = len(prompts) * per_prompt
            written = cache_prompts(
                prompts,
                bundle,
                out,
                per_prompt=per_prompt,
                steps=steps,
                guidance=guidance,
                batch_size=batch_size,
                on_item=lambda done, skipped: advance(done, total, f"{skipped} skipped"),
            )
        else:
            sizes = bundle.contract.sizes
            written = cache_pictures(
                entries,
                bundle,
                out,
                sizes=sizes[:1] if square else sizes,
                demands=Demands(min_side, min_sharpness),
                batch_size=batch_size,
                on_item=lambda done, skipped: advance(done, None, f"{skipped} skipped"),
            )
    _print_summary(written)


def _read_prompts(source: str) -> list[str] | None:
    """Return the lines of a text file of prompts; None if the source is something else."""
    path = Path(source)
    if path.suffix != ".txt" or not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _found_entries(source: str) -> Iterator[Entry]:
    """Return the entries of a source of pictures; DataError if it is missing or empty."""
    from twostep.data.sources import find_entries

    entries = find_entries(source)
    first = list(islice(entries, 1))
    return chain(first, entries)


def _print_summary(written: CacheWriter) -> None:
    """Print what is in the cache, and why some items are not."""
    typer.echo(
        f"{written.folder}: {written.num_cached} items in {written.num_shards} shards, "
        f"{len(written.skipped)} skipped"
    )
    for name, reason in islice(written.skipped.items(), _NUM_NAMED):
        typer.echo(f"skipped {name}: {reason}")
    num_unnamed = len(written.skipped) - _NUM_NAMED
    if num_unnamed > 0:
        typer.echo(f"and {num_unnamed} more, all in {written.folder / 'skipped.jsonl'}")
