"""Verbs that draw and look: generate, info."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from twostep.contract import Contract
from twostep.errors import TwostepError
from twostep.pipeline.png import prepare_folder, save_images
from twostep.pipeline.request import Request, Result

if TYPE_CHECKING:
    from twostep.models.bundle import Bundle

_Model = Annotated[str, typer.Option(help="A built-in name, a model folder or a .safetensors file.")]
_Loras = Annotated[list[str] | None, typer.Option("--lora", help="A LoRA's file, or file:weight; one or several.")]
_Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the PNGs; made where it is missing.")]


class SizeError(TwostepError):
    """A size that is not WIDTHxHEIGHT."""


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: _Model = "nano",
    lora: _Loras = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Picks the student, or with its own count the teacher; 2 where there is a choice."),
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Images, from the seeds that follow.")] = 1,
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Teacher only: how strongly to follow the prompt.")] = None,
    negative: Annotated[str, typer.Option(help="Teacher only: what to stay away from.")] = "",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; the model's own by default.")] = None,
    out: _Folder = Path("out"),
) -> None:
    """Draw a prompt and write PNGs that say how they were made."""
    width, height = _parse_size(size)
    request = Request(
        prompt,
        num_images=num_images,
        seed=seed,
        guidance=guidance,
        negative_prompt=negative,
        width=width,
        height=height,
    )
    prepare_folder(out)
    if steps is None and not lora:
        steps = _default_steps(model)
    start = time.perf_counter()
    with Console(stderr=True).status(f"loading {model}"):
        from twostep.models.worn import load_worn

        bundle = load_worn(model, lora or (), steps=steps)
    loading_seconds = time.perf_counter() - start
    result = _draw(bundle, request)
    for path in save_images(result, out):
        typer.echo(path)
    for warning in result.warnings:
        Console(stderr=True).print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    typer.echo(_times(result, loading_seconds))


def info(
    model: Annotated[str, typer.Argument(help="A built-in name, a model folder or a .safetensors file.")] = "nano",
    as_json: Annotated[bool, typer.Option("--json", help="Print the contracts as a JSON list.")] = False,
) -> None:
    """Print what a model says of itself: how each of its checkpoints must be sampled."""
    from twostep.models.contracts import read_contracts

    contracts = read_contracts(model)
    if as_json:
        typer.echo(json.dumps([json.loads(contract.to_json()) for contract in contracts], indent=2))
    else:
        Console().print(contract_table(contracts))


def _default_steps(model: str) -> int:
    """Two, where the model has a student for it; otherwise what its first contract says."""
    from twostep.models.contracts import read_contracts

    offered = [contract.steps for contract in read_contracts(model)]
    return 2 if 2 in offered else offered[0]


def _draw(bundle: Bundle, request: Request) -> Result:
    """Draw a request under a progress bar."""
    from twostep.pipeline.generation import Progress as Step
    from twostep.pipeline.generation import generate as draw

    name, console = bundle.contract.name, Console(stderr=True)
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
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
        table.add_row(field.replace("_", " "), *(Text(_said(getattr(contract, field))) for contract in contracts))
    return table


def _said(value: object) -> str:
    """Say a value of a contract in words: pictures as 64x64, several things with spaces, none as a dash."""
    if isinstance(value, tuple):
        return " ".join("x".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in value) or "all"
    return "-" if value is None else str(value)


def _parse_size(size: str | None) -> tuple[int, int] | tuple[None, None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise SizeError(f"size is {size!r}; expected WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])
