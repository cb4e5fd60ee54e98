"""The verb that makes a cache to train from: of a user's pictures, or of prompts alone."""

from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.train import progress_bar


def cache(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of pictures with .txt captions, .jsonl, .tar shards (a pattern), hf:dataset; "
            "or a .txt file of prompts, one a line, whose pictures the teacher makes."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the cache; the same command again goes on there.")],
    model: Annotated[str, typer.Option(help="The teacher: its autoencoder and text encoders are used.")] = "nano",
    lora: Annotated[list[str] | None, typer.Option(help="Prompts alone: LoRAs for the teacher, file:weight.")] = None,
    square: Annotated[bool, typer.Option(help="Cut everything square, as the paper did; else to the nearest.")] = False,
    min_side: Annotated[int, typer.Option(min=0, help="Skip pictures with a side of fewer pixels.")] = 0,
    min_sharpness: Annotated[float, typer.Option(min=0, help="Skip blurred ones: deviation of the Laplacian.")] = 0.0,
    per_prompt: Annotated[int, typer.Option(min=1, help="Prompts alone: pictures of each.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Prompts alone: the teacher's steps.")] = None,
    guidance: Annotated[float | None, typer.Option(min=1, help="Prompts alone: the teacher's guidance.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are worked on at once.")] = 8,
) -> None:
    """Encode pictures and captions, or let the teacher draw prompts, into shards to train from."""
    from twostep.data.encoding import cache_pictures, cache_prompts
    from twostep.data.pictures import Demands, find_entries
    from twostep.models.worn import load_worn

    prompts = _read_prompts(source)
    entries = find_entries(source) if prompts is None else iter(())
    first = list(islice(entries, 1))  # so an empty or missing source is told before a model loads
    bundle = load_worn(model, lora or []).as_teacher()
    with progress_bar("cache") as advance:

        def show(done: int, skipped: int) -> None:
            advance(done, None if prompts is None else len(prompts) * per_prompt, f"{skipped} skipped")

        if prompts is None:
            sizes, demands = bundle.contract.sizes, Demands(min_side, min_sharpness)
            pictures = partial(
                cache_pictures, chain(first, entries), sizes=sizes[: 1 if square else None], demands=demands
            )
        else:
            pictures = partial(cache_prompts, prompts, per_prompt=per_prompt, steps=steps, guidance=guidance)
        written = pictures(bundle, out, batch_size=batch_size, on_item=show)
    typer.echo(f"{out}: {written.num_cached} items in {written.num_shards} shards, {len(written.skipped)} skipped")
    for name, reason in list(written.skipped.items())[:5]:
        typer.echo(f"skipped {name}: {reason}")
    if len(written.skipped) > 5:
        typer.echo(f"and {len(written.skipped) - 5} more, all in {out / 'skipped.jsonl'}")


def _read_prompts(source: str) -> list[str] | None:
    path = Path(source)
    if path.suffix != ".txt" or not path.is_file():
        return None
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
