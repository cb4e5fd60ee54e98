"""The verbs that measure students against their teacher: compare, reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.train import progress_bar

if TYPE_CHECKING:
    from twostep.evaluate.measurements import SecondJudge
    from twostep.reports.comparison import Comparison
    from twostep.reports.reproduction import Step


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MODEL...",
            help="Folders of `twostep distill`, model folders, built-in names, students' files.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path(
        "compare"
    ),
    pictures: Annotated[
        int, typer.Option(min=2, help="Pictures of each set of prompts; tables take 2048.")
    ] = 256,
    judge: Annotated[
        Path | None, typer.Option(help="A judge.safetensors; the built-in one by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Compare students of one teacher: table.md, .csv, .json, a page, and a page to vote on.

    The teacher, and what it draws untrained at as many network calls, are compared with them. What
    was drawn is kept in the folder, so the same command goes on after a break.
    """
    from twostep.reports.comparison import compare as compare_rows

    with progress_bar("compare") as advance:
        comparison = compare_rows(
            names,
            num_pictures=pictures,
            judge=judge,
            second=_second_judge(device),
            device=device,
            cache=out / "cache",
            on_progress=advance,
        )
    _write(comparison, out)


def reproduce(
    table: Annotated[str, typer.Argument(help="nano-table, or the path of a TOML file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder; the same command resumes there.")
    ] = Path("runs/nano-table"),
    from_weights: Annotated[
        bool, typer.Option("--from-weights", help="Train nothing: measure what is in the package.")
    ] = False,
    pictures: Annotated[
        int, typer.Option(min=2, help="Pictures of each set of prompts; tables take 2048.")
    ] = 256,
    device: Annotated[str, typer.Option(help="Where to draw: auto, cpu, cuda, cuda:1, mps.")] = (
        "auto"
    ),
) -> None:
    """Make a table anew: train every part and every student, measure them, write the table.

    It says how long that takes before it begins and at every step.
    """
    from twostep.reports.reproduction import Reproduction, compare_weights, in_words, load_table

    loaded = load_table(table)
    second = _second_judge(device)
    if from_weights:
        with progress_bar("draw") as advance:
            comparison = compare_weights(
                loaded,
                out,
                num_pictures=pictures,
                second=second,
                device=device,
                on_progress=advance,
            )
        _write(comparison, out)
        return
    reproduction = Reproduction(loaded, out)
    for step in reproduction.steps:
        state = "not measured yet" if step.minutes is None else in_words(step.minutes)
        if step.name in reproduction.finished:
            state = f"finished in {in_words(reproduction.finished[step.name] / 60)}"
        typer.echo(f"{step.name}: {state}")
    left = in_words(reproduction.remaining_minutes())
    if reproduction.num_unmeasured:
        left += f", and {reproduction.num_unmeasured} trainings of unknown length,"
    typer.echo(
        f"about {left} of training on two CPU cores are left, then {pictures} pictures a row"
    )
    with progress_bar("reproduce") as advance:
        name = ""

        def show(done: int, total: int | None, words: str) -> None:
            advance(done, total, f"{name} {words}")

        def begin(step: Step, minutes: float) -> None:
            nonlocal name
            name = step.name
            typer.echo(f"{step.name} begins; about {in_words(minutes)} are left")

        reproduction.train(show, begin)
        name = "draw"
        comparison = reproduction.compare(
            num_pictures=pictures, second=second, device=device, on_progress=show
        )
    _write(comparison, out)


def _second_judge(device: str) -> SecondJudge | None:
    """Return the second judge if it is installed; the tables say how to get it if it is not."""
    from twostep.evaluate.efficientnet import EfficientNet, is_installed
    from twostep.training.device import find_device

    return EfficientNet(find_device(device)) if is_installed() else None


def _write(comparison: Comparison, out: Path) -> None:
    """Write tables and pages, and print the tables."""
    from twostep.reports.comparison_page import write_comparison
    from twostep.reports.comparison_table import to_markdown

    written = write_comparison(comparison, out)
    typer.echo(to_markdown(comparison))
    for path in written:
        typer.echo(f"written: {path}")
