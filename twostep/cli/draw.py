"""Verbs that draw and look: generate, info, demo."""

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from twostep.contract import Contract
from twostep.errors import TwostepError
from twostep.pipeline.png import encode_png, prepare_folder, save_images, write_atomically
from twostep.pipeline.request import Request, Result

DEMO_PROMPTS = (
    "a 3d red apple on a blue background",
    "a flat fox on a green background",
    "a noto penguin on a teal background",
    "a twemoji pizza on a purple background",
    "a 3d octopus on a yellow background",
    "a flat sunflower on a brown background",
    "a noto strawberry on a white background",
    "a twemoji owl on an orange background",
    "a 3d birthday cake on a pink background",
    "a flat cactus on a red background",
    "a noto ladybug on a gray background",
    "a twemoji mushroom on a black background",
)
_DEMO_SEEDS = 2
_DEMO_PIXELS = 128
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
    [result], loading_seconds = _draw(model, steps, [request], loras=lora or ())
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
        Console().print(_contract_table(contracts))


def demo(
    model: Annotated[str, typer.Option(help="A built-in name or a model folder.")] = "nano",
    seed: Annotated[int, typer.Option(help="The first seed of the gallery.")] = 7,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("out/gallery.png"),
) -> None:
    """Draw a gallery of the 2-step student beside its teacher, from the same noise, and time every student."""
    from twostep.models.contact_sheet import contact_sheet
    from twostep.models.contracts import read_contracts

    prepare_folder(out.parent)
    counts = sorted({contract.steps for contract in read_contracts(model)}, reverse=True)
    requests = [Request(prompt, num_images=_DEMO_SEEDS, seed=seed) for prompt in DEMO_PROMPTS]
    drawn = {steps: _draw(model, steps, requests, warm_up=True)[0] for steps in counts}
    shown = [drawn[counts[0]], drawn[2 if 2 in drawn else counts[-1]]]
    rows = [
        (
            results[0].request.prompt,
            [image for pair in zip(*(r.images for r in results), strict=True) for image in pair],
        )
        for results in zip(*shown, strict=True)
    ]
    labels = [f"{results[0].contract.role}, {_counted(results[0].contract.steps)}" for results in shown]
    scale = max(1, _DEMO_PIXELS // rows[0][1][0].width)
    write_atomically(out, encode_png(contact_sheet(rows, labels * _DEMO_SEEDS, scale=scale), {}))
    Console().print(_speed_table(list(drawn.values())))
    typer.echo(out)


def _default_steps(model: str) -> int:
    """Two, where the model has a student for it; otherwise what its first contract says."""
    from twostep.models.contracts import read_contracts

    offered = [contract.steps for contract in read_contracts(model)]
    return 2 if 2 in offered else offered[0]


def _draw(
    model: str, steps: int | None, requests: Sequence[Request], *, loras: Sequence[str] = (), warm_up: bool = False
) -> tuple[list[Result], float]:
    """Load a model and draw requests with it under a progress bar; also say how many seconds loading took.

    `warm_up` draws one picture before the others, so that their times are those of a machine that has run before.
    """
    start = time.perf_counter()
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        from twostep.models.worn import load_worn
        from twostep.pipeline.generation import Progress as Step
        from twostep.pipeline.generation import generate as draw

        bundle = load_worn(model, loras, steps=steps)
    loading_seconds = time.perf_counter() - start
    if warm_up:
        draw(bundle, requests[0].only(0))

    name = bundle.contract.name
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)

        def on_step(step: Step) -> None:
            bar.update(task, advance=1, total=step.num_steps * len(requests))

        return [draw(bundle, request, on_step=on_step) for request in requests], loading_seconds


def _times(result: Result, loading_seconds: float) -> str:
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.seconds.items())
    number = f"{len(result.images)} image{'s' if len(result.images) > 1 else ''}"
    return f"{number}, {result.seconds_per_image:.2f} s each: {stages}; loading {loading_seconds:.2f} s"


def _contract_table(contracts: list[Contract]) -> Table:
    """Lay contracts out side by side, one column each."""
    table = Table("contract", *(Column(contract.name, overflow="fold") for contract in contracts))
    described = [_describe(contract) for contract in contracts]
    for label in described[0]:
        table.add_row(label, *(Text(values[label]) for values in described))
    return table


def _describe(contract: Contract) -> dict[str, str]:
    """Say each part of a contract in words."""
    lora = "none" if contract.lora_rank is None else f"rank {contract.lora_rank}, alpha {contract.lora_alpha:g}"
    return {
        "role": contract.role,
        "steps": str(contract.steps),
        "trained times": " ".join(map(str, contract.trained_times)) or "all",
        "predicts": contract.prediction_type,
        "spacing": contract.spacing,
        "guidance": "none" if contract.guidance == 1 else f"{contract.guidance:g}",
        "sizes": " ".join(f"{width}x{height}" for width, height in contract.sizes),
        "base": contract.base,
        "LoRA": lora,
        "recipe": contract.recipe,
        "written by": f"twostep {contract.version}",
    }


def _speed_table(results: list[list[Result]]) -> Table:
    """Compare seconds per image; the first list is the teacher's."""
    table = Table("model", "steps", "seconds per image", "speed-up")
    seconds = [sum(result.seconds_per_image for result in drawn) / len(drawn) for drawn in results]
    for drawn, each in zip(results, seconds, strict=True):
        contract = drawn[0].contract
        table.add_row(Text(contract.name), str(contract.steps), f"{each:.3f}", f"{seconds[0] / each:.1f}x")
    return table


def _counted(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _parse_size(size: str | None) -> tuple[int, int] | tuple[None, None]:
    if size is None:
        return None, None
    match = re.fullmatch(r"(\d+)[xX](\d+)", size.strip())
    if match is None:
        raise SizeError(f"size is {size!r}; expected WIDTHxHEIGHT in pixels, such as 64x64.")
    return int(match[1]), int(match[2])
