"""The verb that scores pictures of the built-in models against their prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twostep.cli.train import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from twostep.evaluate.bootstrap import Estimate
    from twostep.evaluate.metrics import Report, Score
    from twostep.evaluate.scene_scores import SceneReport

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
    second_judge: Annotated[
        bool,
        typer.Option(
            "--second-judge",
            help="Measure the distance in EfficientNet's features too; about 0.1 s a picture.",
        ),
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Score pictures against their prompts: what is right, distances, diversity.

    nano's pictures are judged by a classifier, and mini's, which are larger, by comparing them with
    the drawings that mini learnt from.
    """
    from rich.console import Console

    from twostep.reports.evaluation import evaluate_folder
    from twostep.reports.scene_evaluation import evaluate_scene_folder, holds_scenes

    if judge is None and holds_scenes(folder):
        with progress_bar("evaluate") as advance:
            scenes = evaluate_scene_folder(folder, reference=reference, advance=advance)
        _write(scenes.report.to_dict(), json_path)
        _warn_of_unknown(scenes.unknown)
        Console().print(_scene_table(scenes.report, reference))
        return
    answer = evaluate_folder(
        folder, reference=reference, judge=judge, with_second_judge=second_judge
    )
    _write(answer.report.to_dict(), json_path)
    _warn_of_unknown(answer.unknown)
    Console().print(_table(answer.report, reference))


def _write(figures: dict[str, Any], path: Path | None) -> None:
    """Write figures as JSON, if there is a path for them."""
    import json

    from twostep.files import write_atomically

    if path is not None:
        with write_atomically(path) as file:
            file.write(json.dumps(figures, indent=2).encode())


def _warn_of_unknown(paths: tuple[Path, ...]) -> None:
    if not paths:
        return
    from rich.console import Console
    from rich.text import Text

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
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("pictures", str(report.num_images))
    table.add_row("concept right", _share(report.concept))
    table.add_row("subgroup right", _share(report.subgroup))
    table.add_row("style right", _share(report.style))
    table.add_row("background right", _share(report.background))
    table.add_row("open background: none that exists", _share(report.off_palette))
    table.add_row("open background: distance to the nearest", _estimate(report.palette_distance))
    table.add_row(
        "open background: variation to equal shares", _estimate(report.background_to_uniform)
    )
    table.add_row("open style: variation to equal shares", _estimate(report.style_to_uniform))
    table.add_row("fine detail", _estimate(report.high_pass))
    table.add_row("Frechet distance to real pictures", _number(report.frechet_to_real))
    if reference is not None:
        _add_reference(table, report, reference)
    table.add_row("diversity between seeds, features", _number(report.feature_diversity))
    table.add_row("diversity between seeds, pixels", _number(report.pixel_diversity))
    table.add_row("blur, pixels", _number(report.mean_blur_pixels))
    return table


def _scene_table(report: SceneReport, reference: Path | None) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("pictures", str(report.num_images))
    table.add_row("single thing right", _share(report.single))
    table.add_row("two things, both right", _share(report.two))
    table.add_row("styles right", _share(report.style))
    table.add_row("position right", _share(report.position))
    table.add_row("background right", _share(report.background))
    table.add_row("everything right", _share(report.overall))
    if reference is not None:
        table.add_row(
            f"kernel distance to {reference}, second judge", _number(report.kernel_to_reference)
        )
    return table


def _add_reference(table: Table, report: Report, reference: Path) -> None:
    """Add the figures that compare with the reference."""
    table.add_row(f"Frechet distance to {reference}", _estimate(report.frechet_to_reference))
    table.add_row(f"kernel distance to {reference}", _estimate(report.kernel_to_reference))
    table.add_row(
        "kernel distance to it, second judge", _estimate(report.second_kernel_to_reference)
    )
    table.add_row("fine detail, of its", _estimate(report.high_pass_ratio))
    table.add_row("open background: variation to its", _estimate(report.background_to_reference))
    table.add_row("open style: variation to its", _estimate(report.style_to_reference))


def _share(score: Score) -> str:
    if score.share is None:
        return "not asked"
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f" ({100 * score.low:.1f} to {100 * score.high:.1f})"
    return f"{100 * score.share:.1f} % of {score.num_asked}{interval}"


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
