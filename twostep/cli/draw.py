"""Verbs that draw and look: generate, edit, replay, info."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twostep.cli.units import size_in_pixels

if TYPE_CHECKING:
    from rich.table import Table

    from twostep.contract import Contract
    from twostep.models.bundle import Bundle
    from twostep.pipeline.generation import OnStep
    from twostep.pipeline.order import Order
    from twostep.pipeline.provenance import Provenance
    from twostep.pipeline.recordings import OpenRecording
    from twostep.pipeline.request import Request, Result

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
_Decoder = Annotated[
    str,
    typer.Option(help="full; tiny, the model's own smaller one; or a file, as TAESDXL's."),
]
_Frames = Annotated[
    int | None, typer.Option(help="Models of clips only: how many frames; 16 by default.")
]
_Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for the files; made where it is missing.")
]


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
    decoder: _Decoder = "full",
    frames: _Frames = None,
    out: _Folder = Path("out"),
) -> None:
    """Draw a prompt and write PNGs, or clips, that say how they were made."""
    width, height = (None, None) if size is None else size_in_pixels(size)
    _check_steps(model, steps)
    opened = None
    if num_images == 1 and not (lora or control or negative):
        # Before anything else is loaded, which goes on meanwhile.
        opened = _open_recording(
            engine=engine,
            decoder=decoder,
            model=model,
            steps=steps,
            width=width,
            height=height,
        )
    from twostep.pipeline.order import Order

    order = Order(
        prompt,
        model,
        num_images=num_images,
        seed=_parse_seed(seed, num_images),
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        width=width,
        height=height,
        controls=tuple(control or ()),
        loras=tuple(lora or ()),
        sampler=scheduler,
        treated_as=treated_as,
        engine=engine,
        decoder=decoder,
        frames=frames,
    )
    _hand_over_or_draw(order, out, opened)


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
    decoder: _Decoder = "full",
    out: _Folder = Path("out"),
) -> None:
    """Change a picture by a prompt, all of it or where a mask is white."""
    from twostep.pipeline.order import Order

    _check_steps(model, steps)
    order = Order(
        prompt,
        model,
        num_images=num_images,
        seed=_parse_seed(seed, num_images),
        steps=steps,
        guidance=guidance,
        image=str(image),
        strength=strength,
        mask=None if mask is None else str(mask),
        controls=tuple(control or ()),
        loras=tuple(lora or ()),
        sampler=scheduler,
        treated_as=treated_as,
        engine=engine,
        decoder=decoder,
    )
    _hand_over_or_draw(order, out)


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG, a clip or a sound that twostep wrote.")],
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
    """Draw again what a file says of itself, and tell whether every pixel or sample is the same."""
    from twostep.pipeline.provenance import ProvenanceError, difference, read_provenance

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
    _, paths = _draw_and_save(request, out, provenance)
    index = provenance.request.seed - request.seed
    compared = difference(picture, paths[index])
    if compared.largest:
        raise ProvenanceError(
            f"{paths[index]} differs by up to {compared.largest} of {compared.range}: other "
            "weights, or another machine."
        )
    typer.echo(f"every {compared.part} of {paths[index]} is the same", err=True)


def info(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a model folder or a .safetensors file.")
    ] = "nano",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the contracts as a JSON list.")
    ] = False,
) -> None:
    """Print what a model says of itself: how each of its checkpoints must be sampled."""
    from rich.console import Console

    from twostep.formats import read_contracts

    contracts = read_contracts(model)
    if as_json:
        typer.echo(json.dumps([json.loads(contract.to_json()) for contract in contracts], indent=2))
    else:
        Console().print(contract_table(contracts))


def contract_table(contracts: list[Contract]) -> Table:
    """Lay contracts out side by side, one column each and a row for every field."""
    from rich.table import Column, Table
    from rich.text import Text

    columns = [Column(contract.name, overflow="fold") for contract in contracts]
    table = Table("contract", *columns)
    for field in list(asdict(contracts[0]))[1:]:
        if field == "sampling_times" and not any(each.sampling_times for each in contracts):
            continue
        values = [Text(_in_words(getattr(contract, field))) for contract in contracts]
        table.add_row(field.replace("_", " "), *values)
    return table


def _hand_over_or_draw(order: Order, out: Path, opened: OpenRecording | None = None) -> None:
    """Let a server of this user draw an order, or draw it here; write the PNGs and say so."""
    from twostep.pipeline.output import prepare_folder
    from twostep.serve.handover import hand_over

    prepare_folder(out)
    handed = hand_over(order, lambda line: typer.echo(line, err=True))
    if handed is None:
        _draw_and_save(order.request(), out, opened=opened)
        return
    for path in handed.save(out):
        typer.echo(path)
    _print_warnings(handed.warnings)
    times = _times(handed.seconds, len(handed.files))
    typer.echo(f"{times}; drawn by {handed.address}", err=True)


def _print_warnings(warnings: list[str]) -> None:
    if not warnings:
        return
    from rich.console import Console
    from rich.text import Text

    for warning in warnings:
        Console(stderr=True).print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _draw_and_save(
    request: Request,
    out: Path,
    provenance: Provenance | None = None,
    opened: OpenRecording | None = None,
) -> tuple[Result, list[Path]]:
    """Draw a request, write the PNGs, and print their paths, the warnings and the times.

    With a provenance, the request is drawn with the checkpoint that is named there. With an opened
    recording it is drawn from that, if it can be.
    """
    from rich.console import Console

    from twostep.pipeline.output import prepare_folder
    from twostep.pipeline.provenance import save_images

    prepare_folder(out)
    result = None
    if opened is not None:
        from twostep.pipeline.recorded import draw_recorded

        result = draw_recorded(opened, request)
    bundle = None
    loading = ""
    if result is None:
        start = time.perf_counter()
        with Console(stderr=True).status(f"loading {request.model}"):
            bundle = _load(request, provenance)
        loading = f"; loading {time.perf_counter() - start:.2f} s"
        with _progress_bar(bundle.contract.name) as on_step:
            from twostep.pipeline.generation import generate

            result = generate(bundle, request, on_step=on_step)
    paths = save_images(result, out)
    for path in paths:
        typer.echo(path)
    _print_warnings(result.warnings)
    thing = "image" if result.contract.media == "image" else "item"
    times = _times(result.seconds, len(result.images), thing)
    typer.echo(f"{times}{loading}", err=True)
    if bundle is not None and provenance is None:
        _record(bundle, request, result)
    return result, paths


def _open_recording(*, engine: str, **asked: Any) -> OpenRecording | None:
    """Begin to open what draws plain pictures without PyTorch, by the fields of `RecordingKey`.

    None where that was not recorded, and where a server may draw them.
    """
    if not engine.startswith("openvino"):
        return None
    from twostep.serve.announcement import announcements, is_switched_off

    if announcements() and not is_switched_off():
        return None
    # This brings numpy, which commands that are handed over do without.
    from twostep.pipeline.recordings import RecordingKey, open_recording

    return open_recording(RecordingKey(engine=engine, **asked))


def _record(bundle: Bundle, request: Request, result: Result) -> None:
    """Note how a picture was drawn, so that the next one needs no PyTorch."""
    from twostep.pipeline.recorded import is_plain

    if is_plain(request):
        from twostep.pipeline.recording import record

        record(bundle, request, result)


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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

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


def _times(seconds: Mapping[str, float], num_images: int, thing: str = "image") -> str:
    stages = ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
    plural = "s" if num_images > 1 else ""
    per_image = sum(seconds.values()) / num_images
    return f"{num_images} {thing}{plural}, {per_image:.2f} s each: {stages}"


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
    from twostep.pipeline.request import RequestError

    offered = ", ".join(str(contract.steps) for contract in read_contracts(model))
    raise RequestError(
        f"{model} has nothing for {steps} steps; there are {offered}. Give one of these."
    )


def _parse_seed(seed: str, num_images: int) -> int:
    """Read a seed, or pick one and say which on standard error."""
    from twostep.pipeline.request import NUM_DISTINCT_SEEDS, RequestError

    if seed.strip().lower() != "random":
        if re.fullmatch(r"-?\d+", seed.strip()) is None:
            raise RequestError(f"seed is {seed!r}; expected a whole number from 0 up, or random.")
        return int(seed)
    picked = secrets.randbelow(NUM_DISTINCT_SEEDS - min(num_images, NUM_DISTINCT_SEEDS - 1))
    typer.echo(f"seed {picked}", err=True)
    return picked
