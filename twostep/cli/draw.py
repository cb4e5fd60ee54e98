"""Verbs that draw and look: generate, edit, replay, info."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from twostep.contract import Contract
from twostep.pipeline.png import (
    Provenance,
    ProvenanceError,
    prepare_folder,
    read_provenance,
    save_images,
)
from twostep.pipeline.request import (
    NUM_DISTINCT_SEEDS,
    Control,
    Picture,
    Request,
    RequestError,
    Result,
)

if TYPE_CHECKING:
    from twostep.models.bundle import Bundle
    from twostep.pipeline.generation import OnStep

_Model = Annotated[
    str, typer.Option(help="A built-in name, a model folder or a .safetensors file.")
]
_Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="A LoRA's file, or file:weight; a textual inversion, or a folder of them; or several.",
    ),
]
_Controls = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        help="PICTURE@CONTROLNET, or with a scale and shares of the steps, @..:0.8:0-0.5.",
    ),
]
_Steps = Annotated[
    int | None,
    typer.Option(help="Picks the student, or by its count the teacher; 2 if there is one."),
]
_Number = Annotated[
    int, typer.Option("--num-images", "-n", help="Images, from the seeds that follow.")
]
_Seed = Annotated[
    str, typer.Option(help="Image i is drawn from seed + i; `random` picks one and says which.")
]
_Guidance = Annotated[
    float | None, typer.Option(help="Teacher only: how strongly to follow the prompt.")
]
_Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="Teacher only: euler, dpmpp-2m or unipc."),
]
_As = Annotated[
    str | None,
    typer.Option(
        "--as", help="What the model is, of others: lightning, turbo, lcm, hyper, dmd2, base."
    ),
]
_Engine = Annotated[
    str,
    typer.Option(
        help="What runs the networks: eager, auto, compiled, openvino, openvino-int8 or -bf16."
    ),
]
_Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for the PNGs; made where it is missing.")
]

_CONTROL = re.compile(
    r"(?P<picture>.+)@(?P<model>[^@]+?)"
    r"(:(?P<scale>\d*\.?\d+)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?)?"
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: _Model = "nano",
    lora: _Loras = None,
    steps: _Steps = None,
    num_images: _Number = 1,
    seed: _Seed = "0",
    guidance: _Guidance = None,
    negative: Annotated[str, typer.Option(help="Teacher only: what to stay away from.")] = "",
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own by default.")
    ] = None,
    control: _Controls = None,
    scheduler: _Scheduler = None,
    treated_as: _As = None,
    engine: _Engine = "eager",
    out: _Folder = Path("out"),
) -> None:
    """Draw a prompt and write PNGs that say how they were made."""
    width, height = _parse_size(size)
    _check_steps(model, steps)
    loras, embeddings = _parse_loras(lora)
    request = Request(
        prompt,
        num_images=num_images,
        seed=_parse_seed(seed, num_images),
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        width=width,
        height=height,
        controls=_parse_controls(control),
        model=model,
        loras=loras,
        embeddings=embeddings,
        sampler=scheduler,
        treated_as=treated_as,
        engine=engine,
    )
    _draw_and_save(request, out)


def edit(
    prompt: Annotated[str, typer.Argument(help="What the picture becomes.")],
    image: Annotated[Path, typer.Argument(help="The picture that is changed.")],
    model: _Model = "nano",
    lora: _Loras = None,
    steps: _Steps = None,
    strength: Annotated[
        float | None, typer.Option(help="How much, up to 1; by default 0.75, with a mask 1.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture of the same size, white where it is changed.")
    ] = None,
    control: _Controls = None,
    num_images: _Number = 1,
    seed: _Seed = "0",
    guidance: _Guidance = None,
    scheduler: _Scheduler = None,
    treated_as: _As = None,
    engine: _Engine = "eager",
    out: _Folder = Path("out"),
) -> None:
    """Change a picture by a prompt, all of it or where a mask is white."""
    _check_steps(model, steps)
    loras, embeddings = _parse_loras(lora)
    request = Request(
        prompt,
        num_images=num_images,
        seed=_parse_seed(seed, num_images),
        steps=steps,
        guidance=guidance,
        image=Picture.of(image),
        strength=strength,
        mask=None if mask is None else Picture.of(mask),
        controls=_parse_controls(control),
        model=model,
        loras=loras,
        embeddings=embeddings,
        sampler=scheduler,
        treated_as=treated_as,
        engine=engine,
    )
    _draw_and_save(request, out)


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that twostep wrote.")],
    inputs: Annotated[
        Path, typer.Option(help="Where pictures lie that went in, if neither here nor beside.")
    ] = Path(),
    model: Annotated[
        str | None, typer.Option(help="Where the model lies now, if it was moved.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="Where a LoRA lies now, if it was moved; one or several."),
    ] = None,
    out: _Folder = Path("out"),
) -> None:
    """Draw a picture again from what its PNG says, and tell whether every pixel is the same."""
    from PIL import Image, ImageChops

    provenance = read_provenance(picture)
    if not provenance.origin and model is None:
        raise ProvenanceError(f"{picture} does not say which model drew it. Give it with --model.")
    folders = [inputs, Path(), picture.parent]
    request = provenance.batch.reopen(folders)
    if model is not None:
        request = replace(request, model=model)
    from twostep.pipeline.lora_hashes import with_moved_loras

    request, moved = with_moved_loras(request, provenance, lora or [], folders)
    for line in moved:
        typer.echo(line, err=True)
    result, paths = _draw_and_save(request, out, provenance)
    index = provenance.request.seed - request.seed
    with Image.open(picture) as first:
        difference = ImageChops.difference(first.convert("RGB"), result.images[index])
    largest = max(difference.tobytes())
    if largest:
        raise ProvenanceError(
            f"{paths[index]} differs by up to {largest} of 255: other weights, or another machine."
        )
    typer.echo(f"every pixel of {paths[index]} is the same", err=True)


def info(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a model folder or a .safetensors file.")
    ] = "nano",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the contracts as a JSON list.")
    ] = False,
) -> None:
    """Print what a model says of itself: how each of its checkpoints must be sampled."""
    from twostep.formats import read_contracts

    contracts = read_contracts(model)
    if as_json:
        typer.echo(json.dumps([json.loads(contract.to_json()) for contract in contracts], indent=2))
    else:
        Console().print(contract_table(contracts))


def contract_table(contracts: list[Contract]) -> Table:
    """Lay contracts out side by side, one column each and a row for every field."""
    columns = [Column(contract.name, overflow="fold") for contract in contracts]
    table = Table("contract", *columns)
    for field in list(asdict(contracts[0]))[1:]:
        if field == "sampling_times" and not any(each.sampling_times for each in contracts):
            continue
        values = [Text(_in_words(getattr(contract, field))) for contract in contracts]
        table.add_row(field.replace("_", " "), *values)
    return table


def _draw_and_save(
    request: Request, out: Path, provenance: Provenance | None = None
) -> tuple[Result, list[Path]]:
    """Draw a request, write the PNGs, and print their paths, the warnings and the times.

    With a provenance, the request is drawn with the checkpoint that is named there.
    """
    prepare_folder(out)
    start = time.perf_counter()
    with Console(stderr=True).status(f"loading {request.model}"):
        bundle = _load(request, provenance)
    loading_seconds = time.perf_counter() - start
    with _progress_bar(bundle.contract.name) as on_step:
        from twostep.pipeline.generation import generate

        result = generate(bundle, request, on_step=on_step)
    paths = save_images(result, out)
    for path in paths:
        typer.echo(path)
    for warning in result.warnings:
        Console(stderr=True).print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    typer.echo(_times(result, loading_seconds), err=True)
    return result, paths


def _load(request: Request, provenance: Provenance | None) -> Bundle:
    """Load the model of a request, or the checkpoint that drew a picture before."""
    from twostep.models.loading import load_with_loras
    from twostep.pipeline.studio import Studio

    studio = Studio()
    if provenance is None:
        return studio.load(request)
    # A teacher may have drawn in another number of steps than its own, which is what picks it.
    request = replace(request, steps=provenance.contract.steps)
    if not provenance.has_merged_loras:
        return studio.load(request)
    loras = [str(lora) for lora in request.loras]
    bundle = load_with_loras(
        request.model, loras, steps=request.steps, embeddings=request.embeddings
    )
    return bundle.to(studio.device, studio.dtype)


@contextmanager
def _progress_bar(name: str) -> Iterator[OnStep]:
    """Show a progress bar on a terminal; gives what is to be called after every step."""
    from twostep.pipeline.generation import Progress as Step

    console = Console(stderr=True)
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)

        def on_step(step: Step) -> None:
            bar.update(task, advance=1, total=step.num_steps)

        yield on_step


def _times(result: Result, loading_seconds: float) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    plural = "s" if len(result.images) > 1 else ""
    return (
        f"{len(result.images)} image{plural}, {result.seconds_per_image:.2f} s each: {stages}; "
        f"loading {loading_seconds:.2f} s"
    )


def _in_words(value: object) -> str:
    """Write a value of a contract: pictures as 64x64, several with spaces, none as a dash."""
    if value is None:
        return "-"
    if not isinstance(value, tuple):
        return str(value)
    parts = ["x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in value]
    return " ".join(parts) or "all"


def _check_steps(model: str, steps: int | None) -> None:
    """Refuse a number of steps that no request may have, and list those that the model has."""
    if steps is None or steps >= 1:
        return
    from twostep.formats import read_contracts

    offered = ", ".join(str(contract.steps) for contract in read_contracts(model))
    raise RequestError(
        f"{model} has nothing for {steps} steps; there are {offered}. Give one of these."
    )


def _parse_loras(given: list[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return LoRAs, and the textual inversions among them."""
    if not given:
        return (), ()
    from twostep.formats.embeddings import is_embedding

    embeddings = tuple(each for each in given if is_embedding(each))
    return tuple(each for each in given if each not in embeddings), embeddings


def _parse_seed(seed: str, num_images: int) -> int:
    """Read a seed, or pick one and say which on standard error."""
    if seed.strip().lower() != "random":
        if re.fullmatch(r"-?\d+", seed.strip()) is None:
            raise RequestError(f"seed is {seed!r}; expected a whole number from 0 up, or random.")
        return int(seed)
    picked = secrets.randbelow(NUM_DISTINCT_SEEDS - min(num_images, NUM_DISTINCT_SEEDS - 1))
    typer.echo(f"seed {picked}", err=True)
    return picked


def _parse_controls(controls: list[str] | None) -> tuple[Control, ...]:
    """Read "PICTURE@CONTROLNET:SCALE:FROM-TO", of which all after the ControlNet may be missing."""
    parsed = []
    for text in controls or ():
        match = _CONTROL.fullmatch(text)
        if match is None:
            raise RequestError(
                f"control is {text!r}; expected PICTURE@CONTROLNET:SCALE, "
                "as shape.png@silhouette:0.8."
            )
        control = Control(
            Picture.of(match["picture"]),
            match["model"],
            scale=float(match["scale"] or 1),
            start=float(match["start"] or 0),
            end=float(match["end"] or 1),
        )
        parsed.append(control)
    return tuple(parsed)


def _parse_size(size: str | None) -> tuple[int, int] | tuple[None, None]:
    """Read WIDTHxHEIGHT."""
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise RequestError(f"size is {size!r}; expected WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])
