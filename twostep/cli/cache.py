"""The verb that makes a cache to train from, of a user's pictures or of prompts alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.train import progress_bar

if TYPE_CHECKING:
    from twostep.data.cache import CacheWriter
    from twostep.data.sources import Columns, Entry, Findings

_NUM_NAMED = 5
"""Skipped items that are printed with their reasons; more are counted."""


def _size(text: str) -> tuple[int, int]:
    """Return the width and height of a size like 832x1216."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) % 8 or int(match[2]) % 8:
        raise typer.BadParameter(f"{text} is no size in multiples of 8; write 832x1216.")
    return int(match[1]), int(match[2])


def _weight(text: str) -> tuple[str, float]:
    """Return the folder and the number of a weight like fox=2.5."""
    name, _, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = 0.0
    if not name or weight <= 0:
        raise typer.BadParameter(f"{text} is no weight; write FOLDER=2.5.")
    return name.rstrip("/"), weight


def cache(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders of pictures with .txt or .caption files, .jsonl, .csv, .tar shards (a "
            "pattern), hf:dataset; or one .txt file of prompts, one a line, whose pictures the "
            "teacher makes."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the cache; the same command again brings it up to date with its "
            "sources."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The teacher: its autoencoder and text encoders are used.")
    ] = "nano",
    lora: Annotated[
        list[str] | None, typer.Option(help="Prompts alone: LoRAs for the teacher, file:weight.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, mps; auto is the accelerator if there is one.")
    ] = "auto",
    redo: Annotated[bool, typer.Option("--redo", help="Begin anew.")] = False,
    keep_others: Annotated[
        bool, typer.Option("--keep-others", help="Keep what these sources do not have.")
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="Tables: the name of the picture's column.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Tables: the name of the caption's column.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Cut to this instead of the model's sizes, as 832x1216; or several."),
    ] = None,
    square: Annotated[
        bool, typer.Option(help="Cut everything square, as the paper did; else to the nearest.")
    ] = False,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="FOLDER=2.5: draw its pictures that often; or several."),
    ] = None,
    flips: Annotated[bool, typer.Option("--flips", help="Cache pictures mirrored too.")] = False,
    shuffles: Annotated[
        int, typer.Option(min=1, help="Cache captions in this many orders of their parts.")
    ] = 1,
    kept_parts: Annotated[
        int, typer.Option(min=0, help="Parts at the beginning that --shuffles leaves in place.")
    ] = 1,
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
    from twostep.data.encoding import Variants, cache_pictures, cache_prompts, count_cut
    from twostep.data.sources import Demands, Findings
    from twostep.models.loading import load_with_loras
    from twostep.training.device import find_device

    prompts = _read_prompts(sources)
    sizes = [_size(text) for text in size or []]
    weights = dict(_weight(text) for text in weight or [])
    findings = Findings()
    captions: list[str] = []
    # Looked for before a model is loaded, which takes long.
    entries: Iterator[Entry] = iter(())
    if prompts is None:
        columns = _columns(image_column, caption_column)
        entries = _found_entries(sources, columns, weights, findings)
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
                device=find_device(device),
                redo=redo,
                keep_others=keep_others,
                on_item=lambda done, skipped: advance(done, total, f"{skipped} skipped"),
            )
        else:
            sizes = sizes or list(bundle.contract.sizes)
            written = cache_pictures(
                _noting_captions(entries, captions),
                bundle,
                out,
                sizes=sizes[:1] if square else sizes,
                demands=Demands(min_side, min_sharpness),
                variants=Variants(flips, shuffles, kept_parts),
                batch_size=batch_size,
                device=find_device(device),
                redo=redo,
                keep_others=keep_others,
                on_item=lambda done, skipped: advance(done, None, f"{skipped} skipped"),
            )
    _print_summary(written)
    _print_findings(findings, count_cut(bundle, captions if prompts is None else prompts))


def _read_prompts(sources: Sequence[str]) -> list[str] | None:
    """Return the lines of a text file of prompts; None if the sources are something else."""
    from twostep.data.sources import DataError
    from twostep.data.texts import UnreadableTextError, read_lines

    path = Path(sources[0])
    if len(sources) > 1 or path.suffix.lower() != ".txt" or not path.is_file():
        return None
    try:
        lines = read_lines(path)
    except UnreadableTextError as error:
        raise DataError(f"{path}: {error}.") from error
    return [line.strip() for line in lines if line.strip()]


def _columns(image: str | None, caption: str | None) -> Columns:
    """Return the columns that flags name, and the usual ones where they name none."""
    from twostep.data.sources import CAPTION_KEYS, IMAGE_KEYS, Columns

    return Columns((image,) if image else IMAGE_KEYS, (caption,) if caption else CAPTION_KEYS)


def _found_entries(
    sources: Sequence[str], columns: Columns, weights: dict[str, float], findings: Findings
) -> Iterator[Entry]:
    """Return the entries of sources of pictures; DataError if the first is missing or empty."""
    from twostep.data.sources import find_all_entries

    entries = find_all_entries(sources, columns=columns, weights=weights, findings=findings)
    first = list(islice(entries, 1))
    return chain(first, entries)


def _noting_captions(entries: Iterator[Entry], captions: list[str]) -> Iterator[Entry]:
    for entry in entries:
        captions.extend(entry.captions)
        yield entry


def _print_summary(written: CacheWriter) -> None:
    """Print what is in the cache, and why some items are not."""
    typer.echo(
        f"{written.folder}: {written.num_cached} items in {written.num_shards} shards, "
        f"{len(written.skipped)} skipped"
    )
    if written.num_changed:
        typer.echo(f"{written.num_changed} had changed and were made anew")
    if written.num_dropped:
        typer.echo(f"{written.num_dropped} dropped that the sources do not have any more")
    if written.num_of_before:
        typer.echo(
            f"{written.num_of_before} are of an older version, which did not note what they were "
            "made from; they were taken as they are, and --redo makes them anew"
        )
    for name, reason in islice(written.skipped.items(), _NUM_NAMED):
        typer.echo(f"skipped {name}: {reason}")
    num_unnamed = len(written.skipped) - _NUM_NAMED
    if num_unnamed > 0:
        typer.echo(f"and {num_unnamed} more, all in {written.folder / 'skipped.jsonl'}")


def _print_findings(findings: Findings, num_cut: int) -> None:
    """Print what else is worth saying of the sources."""
    if findings.other_files:
        counts = (f"{ending} {count}" for ending, count in findings.other_files.most_common())
        typer.echo(f"left alone, by their endings: {', '.join(counts)}")
    for table, count in findings.unlisted.items():
        typer.echo(f"{table} does not list {count} of the pictures beside it; they were left alone")
    for folder, repeats in findings.repeats.items():
        typer.echo(f"{folder}: drawn {repeats} times as often, as its name says")
    if num_cut:
        typer.echo(f"{num_cut} captions are too long for the text encoders and were cut off")
