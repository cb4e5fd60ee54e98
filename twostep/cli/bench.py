"""The verb that times drawings: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.units import size_in_pixels

if TYPE_CHECKING:
    from rich.table import Table

    from twostep.reports.speed import Row
    from twostep.reports.starts import Start


def bench(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a model folder or a .safetensors file.")
    ] = "nano",
    engine: Annotated[
        list[str] | None,
        typer.Option(help="An engine to time, or several; by default eager and openvino."),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps of a student, or several; by default 1, 2, 4.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT in pixels, or several; by default the model's own."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Pictures at once, or several; by default 1.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Drawings of each that count.")] = 20,
    peers: Annotated[
        bool,
        typer.Option(
            help="Also time diffusers' own pipeline, OpenVINO GenAI's where it is installed, and "
            "OpenVINO's calls alone."
        ),
    ] = True,
    device: Annotated[
        str, typer.Option(help="Where to draw: cpu, cuda, cuda:1, ... or auto.")
    ] = "cpu",
    starts: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also draw so often from cold, each in a process of its own, on the device that "
            "`twostep generate` takes.",
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for speed.json and its plots.")
    ] = None,
) -> None:
    """Time engines, beside diffusers and bare OpenVINO calls, in turns on this machine."""
    from rich.console import Console

    from twostep.files import write_atomically
    from twostep.formats import read_contracts
    from twostep.reports import speed
    from twostep.reports.curves import plot_curves
    from twostep.reports.starts import time_starts
    from twostep.training.device import find_device

    sizes = [size_in_pixels(each) for each in size or ()]
    cases = speed.every_case(
        steps or [1, 2, 4], sizes or [read_contracts(model)[0].sizes[0]], batch or [1]
    )
    machine = speed.machine(find_device(device))
    engines = engine or ["eager", "openvino"]
    begun: list[Start] = []
    with Console(stderr=True).status("") as status:
        rows = speed.compare_speed(
            model,
            engines=engines,
            cases=cases,
            rounds=rounds,
            peers=peers,
            device=device,
            on_case=lambda case: status.update(f"{model}, {case}"),
        )
        if starts:
            begun = time_starts(
                model,
                engines=engines,
                cases=cases,
                rounds=starts,
                on_case=lambda case: status.update(f"{model}, {case}, from cold"),
            )
    for name, value in machine.items():
        typer.echo(f"{name:>10}  {value}")
    Console().print(_table(rows))
    if begun:
        Console().print(_table_of_starts(begun))
    if out is None:
        return
    found = {
        "machine": machine,
        "model": model,
        "rows": speed.as_json(rows),
        "starts": [each.as_json() for each in begun],
    }
    texts = {
        "speed.json": json.dumps(found, indent=2),
        "speed.svg": speed.plot(rows),
        "curves.svg": plot_curves(rows, begun),
    }
    for name, text in texts.items():
        if text is not None:
            with write_atomically(out / name) as file:
                file.write(text.encode())
            typer.echo(out / name)


def _table(rows: list[Row]) -> Table:
    """Lay rows out: milliseconds of a drawing, and the ratio to the slowest of the same case."""
    from rich.table import Table

    table = Table("case", "", "text", "denoise", "decode", "total, ms (quartiles)", "x")
    for row in rows:
        slowest = max(
            (other for other in rows if other.case == row.case),
            key=lambda other: other.total.median,
        )
        low, high = (1e3 * value for value in row.total.quartiles)
        stages = [
            f"{1e3 * row.stages[stage].median:.1f}" if stage in row.stages else ""
            for stage in ("text", "denoise", "decode")
        ]
        table.add_row(
            str(row.case),
            row.name,
            *stages,
            f"{1e3 * row.total.median:.1f} ({low:.1f} to {high:.1f})",
            f"{row.times_as_fast_as(slowest).median:.2f}",
        )
    return table


def _table_of_starts(starts: list[Start]) -> Table:
    """Lay processes out: seconds, the ratio to `import torch` in the same rounds, and memory."""
    from rich.table import Table

    from twostep.reports.starts import TORCH

    table = Table("case", "from cold", "seconds (quartiles)", f"x {TORCH}", "most MiB")
    for start in starts:
        torch = next(each for each in starts if (each.name, each.case) == (TORCH, start.case))
        low, high = start.seconds.quartiles
        table.add_row(
            str(start.case),
            start.name,
            f"{start.seconds.median:.2f} ({low:.2f} to {high:.2f})",
            f"{start.times_as_long_as(torch).median:.2f}",
            f"{start.peak_bytes / 2**20:.0f}",
        )
    return table
