"""Verbs that draw and look: generate, edit, replay, info."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from twostep.contract import Contract
from twostep.pipeline.png import ProvenanceError, prepare_folder, read_provenance, save_images
from twostep.pipeline.request import Control, Picture, Request, RequestError, Result

if TYPE_CHECKING:
    from twostep.models.bundle import Bundle

_Model = Annotated[
    str, typer.Option(help="A built-in name, a model folder or a .safetensors file.")
]
_Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="A LoRA's file, or file:weight; one or several.")
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
_Seed = Annotated[int, typer.Option(help="Image i is drawn from seed + i.")]
_Guidance = Annotated[
    float | None, typer.Option(help="Teacher only: how strongly to follow the prompt.")
]
_CONTROL = re.compile(
    r"(?P<picture>.+)@(?P<model>[^@]+?)(:(?P<scale>\d*\.?\d+)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?)?"
)
_Folder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for the PNGs; made where it is missing.")
]


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: _Model = "nano",
    lora: _Loras = None,
    steps: _Steps = None,
    num_images: _Number = 1,
    seed: _Seed = 0,
    guidance: _Guidance = None,
    negative: Annotated[str, typer.Option(help="Teacher only: what to stay away from.")] = "",
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own by default.")
    ] = None,
    control: _Controls = None,
    out: _Folder = Path("out"),
) -> None:
    """Draw a prompt and write PNGs that say how they were made."""
    width, height = _parse_size(size)
    request = Request(
        prompt,
        num_images=num_images,
        seed=seed,
        guidance=guidance,
        controls=_parse_controls(control),
    )
    _make(
        replace(request, negative_prompt=negative, width=width, height=height),
        model,
        lora,
        steps,
        out,
    )


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
    seed: _Seed = 0,
    guidance: _Guidance = None,
    out: _Folder = Path("out"),
) -> None:
    """Change a picture by a prompt, all of it or where a mask is white."""
    request = Request(
        prompt,
        num_images=num_images,
        seed=seed,
        guidance=guidance,
        controls=_parse_controls(control),
    )
    shown = None if mask is None else Picture.of(mask)
    _make(
        replace(request, image=Picture.of(image), strength=strength, mask=shown),
        model,
        lora,
        steps,
        out,
    )


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that twostep wrote.")],
    inputs: Annotated[
        Path, typer.Option(help="Where pictures lie that went in, if neither here nor beside.")
    ] = Path(),
    model: Annotated[
        str | None, typer.Option(help="Where the model lies now, if it was moved.")
    ] = None,
    out: _Folder = Path("out"),
) -> None:
    """Draw a picture again from what its PNG says, and tell whether every pixel is the same."""
    from PIL import Image, ImageChops

    told = read_provenance(picture)
    origin = told.origin or ((model,) if model else ())
    if not origin:
        raise ProvenanceError(f"{picture} does not say which model drew it. Give it with --model.")
    request = told.batch.found([inputs, Path(), picture.parent])
    result, paths = _make(request, model or origin[0], origin[1:], told.contract.steps, out)
    index = told.request.seed - request.seed
    with Image.open(picture) as first:
        apart = max(ImageChops.difference(first.convert("RGB"), result.images[index]).tobytes())
    if apart:
        raise ProvenanceError(
            f"{paths[index]} differs by up to {apart} of 255: other weights, or another machine."
        )
    typer.echo(f"every pixel of {paths[index]} is the same")


def _make(
    request: Request, model: str, loras: Sequence[str] | None, steps: int | None, out: Path
) -> tuple[Result, list[Path]]:
    """Draw a request, write the PNGs, and print their paths, what is to be warned of, and the
    times.
    """
    prepare_folder(out)
    start = time.perf_counter()
    with Console(stderr=True).status(f"loading {model}"):
        import torch

        from twostep.formats import resolve
        from twostep.models.loading import load_with_loras

        checkpoint = resolve(model, steps=steps)
        if steps is None and not loras:
            offered = [contract.steps for contract in checkpoint.contracts]
            steps = 2 if 2 in offered else offered[0]
        bundle = load_with_loras(checkpoint, loras or (), steps=steps)
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            bundle.to(accelerator, torch.float16)
    loading_seconds = time.perf_counter() - start
    result = _draw(bundle, request)
    paths = save_images(result, out)
    for path in paths:
        typer.echo(path)
    for warning in result.warnings:
        Console(stderr=True).print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    typer.echo(_times(result, loading_seconds))
    return result, paths


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


def _draw(bundle: Bundle, request: Request) -> Result:
    """Draw a request under a progress bar."""
    from twostep.pipeline.generation import Progress as Step
    from twostep.pipeline.generation import generate as draw

    name, console = bundle.contract.name, Console(stderr=True)
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

        return draw(bundle, request, on_step=on_step)


def _times(result: Result, loading_seconds: float) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    number = f"{len(result.images)} image{'s' if len(result.images) > 1 else ''}"
    return f"{number}, {result.seconds_per_image:.2f} s each: {stages}; loading {loading_seconds:.2f} s"


def contract_table(contracts: list[Contract]) -> Table:
    """Lay contracts out side by side, one column each and a row for every field."""
    table = Table("contract", *(Column(contract.name, overflow="fold") for contract in contracts))
    for field in list(asdict(contracts[0]))[1:]:
        table.add_row(
            field.replace("_", " "),
            *(Text(_said(getattr(contract, field))) for contract in contracts),
        )
    return table


def _said(value: object) -> str:
    """Say a value of a contract in words: pictures as 64x64, several things with spaces, none as a
    dash.
    """
    if isinstance(value, tuple):
        return (
            " ".join(
                "x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in value
            )
            or "all"
        )
    return "-" if value is None else str(value)


def _parse_controls(controls: list[str] | None) -> tuple[Control, ...]:
    found = []
    for text in controls or ():
        match = _CONTROL.fullmatch(text)
        if match is None:
            raise RequestError(
                f"control is {text!r}; expected PICTURE@CONTROLNET:SCALE, as shape.png@silhouette:0.8."
            )
        scale, start, end = (
            float(match[key] or usual) for key, usual in (("scale", 1), ("start", 0), ("end", 1))
        )
        found.append(Control(Picture.of(match["picture"]), match["model"], scale, start, end))
    return tuple(found)


def _parse_size(size: str | None) -> tuple[int, int] | tuple[None, None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise RequestError(f"size is {size!r}; expected WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])
