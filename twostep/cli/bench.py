"""The verb that times drawings: bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from twostep.reports.speed import Row


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
        typer.Option(help="Also time diffusers' own pipeline, and OpenVINO's calls alone."),
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for speed.json and speed.svg.")
    ] = None,
) -> None:
    """Time engines, beside diffusers and bare OpenVINO calls, in turns on this machine."""
    from rich.console import Console

    from twostep.cli.draw import _parse_size
    from twostep.files import write_atomically
    from twostep.formats import read_contracts
    from twostep.reports import speed

    sizes = [_parse_size(each) for each in size or ()]
    cases = speed.every_case(
        steps or [1, 2, 4],
        [(width, height) for width, height in sizes if width and height]
        or [read_contracts(model)[0].sizes[0]],
        batch or [1],
    )
    machine = speed.machine()
    with Console(stderr=True).status("") as status:
        rows = speed.compare_speed(
            model,
            engines=engine or ["eager", "openvino"],
            cases=cases,
            rounds=rounds,
            peers=peers,
            on_case=lambda case: status.update(f"{model}, {case}"),
        )
    for name, value in machine.items():
        typer.echo(f"{name:>10}  {value}")
    Console().print(_table(rows))
    if out is not None:
        found = {"machine": machine, "model": model, "rows": speed.as_json(rows)}
        for path, text in (
            (out / "speed.json", json.dumps(found, indent=2)),
            (out / "speed.svg", speed.plot(rows)),
        ):
            with write_atomically(path) as file:
                file.write(text.encode())
            typer.echo(path)


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
