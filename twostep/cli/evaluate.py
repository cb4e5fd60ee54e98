"""The verb that scores pictures of the built-in models against their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from twostep.evaluate.metrics import Report, Score

_NUM_NAMED = 5
"""Pictures that are named in a warning; more are counted."""


def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Folder of PNGs as `twostep generate` wrote them.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Folder of PNGs to measure the distance to.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="A judge.safetensors; the built-in one by default.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Score pictures against their prompts: concept, style, background, distances, diversity."""
    import json

    from twostep.files import write_atomically
    from twostep.reports.evaluation import evaluate_folder

    answer = evaluate_folder(folder, reference=reference, judge=judge)
    if json_path is not None:
        with write_atomically(json_path) as file:
            file.write(json.dumps(answer.report.to_dict(), indent=2).encode())
    _warn_of_unknown(answer.unknown)
    Console().print(_table(answer.report, reference))


def _warn_of_unknown(paths: tuple[Path, ...]) -> None:
    if not paths:
        return
    names = ", ".join(path.name for path in paths[:_NUM_NAMED])
    if len(paths) > _NUM_NAMED:
        names += ", ..."
    text = (
        f"warning: {len(paths)} picture(s) are not scored against a prompt, for they have none, "
        f"or one that names something the judge does not know: {names}. "
        "They count in the distances only."
    )
    Console(stderr=True).print(Text(text, style="yellow"), soft_wrap=True)


def _table(report: Report, reference: Path | None) -> Table:
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("pictures", str(report.num_images))
    table.add_row("concept right", _share(report.concept))
    table.add_row("subgroup right", _share(report.subgroup))
    table.add_row("style right", _share(report.style))
    table.add_row("background right", _share(report.background))
    table.add_row("Frechet distance to real pictures", _number(report.frechet_to_real))
    if reference is not None:
        table.add_row(f"Frechet distance to {reference}", _number(report.frechet_to_reference))
    table.add_row("diversity between seeds, features", _number(report.feature_diversity))
    table.add_row("diversity between seeds, pixels", _number(report.pixel_diversity))
    table.add_row("blur, pixels", _number(report.mean_blur_pixels))
    return table


def _share(score: Score) -> str:
    if score.share is None:
        return "not asked"
    return f"{100 * score.share:.1f} % of {score.num_asked}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
