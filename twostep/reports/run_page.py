"""A run as one page: stages, curves, samples, contracts, environment, recipe.

The page is one HTML file that needs nothing else. Everything comes from the run's folder, so it can
be made while the run goes on, and of a run that was killed. How it looks is in `run_page.html`.
"""

import base64
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from pydantic import ValidationError

from twostep.contract import Contract
from twostep.distill.recipe import Stage
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.training.run_folder import RunError

SECONDS = "seconds_per_iteration"
NOT_CURVES = {"time", "part", "iteration", "trouble", SECONDS}
"""What lines of the log hold beside figures."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One figure over the iterations.

    Args:
        points: of an SVG polyline.
        summary: least, largest and last value, in words.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
    """

    points: str
    summary: str
    width: int = 280
    height: int = 90


@dataclass(frozen=True)
class Part:
    """One stage as the log has it.

    Args:
        name: of the stage.
        iteration: the last one in the log.
        pace: seconds per iteration.
        grid: the latest samples; None if there are none yet.
        curves: by figure; a figure that was never finite has none.
    """

    name: str
    iteration: int
    pace: float
    grid: Path | None
    curves: dict[str, Curve]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; RunError if it is no run."""
    record = folder / "run.toml"
    if not record.is_file():
        raise RunError(
            f"{folder} holds no run: it has no run.toml. Give the --out of a `twostep distill`."
        )
    recipe = record.read_text(encoding="utf-8")
    lines = _read_log(folder / "log.jsonl")
    parts = _read_parts(lines, folder)
    template = Path(__file__).with_name("run_page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(template).render(
        title=f"twostep: {folder.resolve().name}",
        stages=_iterations_by_stage(recipe, parts),
        parts=parts,
        encoded=_encoded,
        environments=_environments(lines),
        students=_students(folder),
        recipe=recipe,
    )
    with write_atomically(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def _read_log(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _iterations_by_stage(recipe: str, parts: dict[str, Part]) -> dict[str, int]:
    """Return how many iterations each stage has; of a recipe before stages, what the log has."""
    values = tomllib.loads(recipe)
    if "stages" not in values:
        return {name: part.iteration for name, part in parts.items()}
    try:
        stages = [Stage.model_validate(stage) for stage in values["stages"]]
    except ValidationError as error:
        raise RunError(f"the recipe of this run cannot be read: {error}") from error
    return {stage.name: stage.iterations for stage in stages}


def _environments(lines: Iterable[Line]) -> list[Line]:
    """Return on what the run ran, each environment once."""
    environments: list[Line] = []
    for line in lines:
        if line["part"] == "environment":
            environment = {key: value for key, value in line.items() if key not in NOT_CURVES}
            if environment not in environments:
                environments.append(environment)
    return environments


def _students(folder: Path) -> list[Contract]:
    """Return the contracts of the released students, that of the most steps first."""
    paths = sorted((folder / "model").glob("students/*.safetensors"))
    contracts = [resolve(path).contract for path in paths]
    return sorted(contracts, key=lambda contract: -contract.steps)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _read_parts(lines: Iterable[Line], folder: Path) -> dict[str, Part]:
    by_part: dict[str, dict[int, Line]] = {}
    for line in lines:
        if "iteration" not in line:
            continue
        # A killed run logs the iterations after its last checkpoint again: the later line counts.
        by_iteration = by_part.setdefault(line["part"], {})
        by_iteration.setdefault(line["iteration"], {}).update(line)
    parts = {}
    for name, by_iteration in by_part.items():
        in_order = [by_iteration[iteration] for iteration in sorted(by_iteration)]
        parts[name] = _read_part(name, in_order, folder)
    return parts


def _read_part(name: str, lines: Sequence[Line], folder: Path) -> Part:
    """Return a stage from its lines of the log, in order."""
    curves = {}
    for figure in dict.fromkeys(key for line in lines for key in line if key not in NOT_CURVES):
        points = [
            (line["iteration"], line[figure])
            for line in lines
            if math.isfinite(line.get(figure, math.nan))
        ]
        if points:
            curves[figure] = _curve(points)
    paces = [line[SECONDS] for line in lines if SECONDS in line]
    grids = sorted((folder / "samples").glob(f"{name}-[0-9]*.png"))
    return Part(
        name=name,
        iteration=lines[-1]["iteration"],
        pace=paces[-1] if paces else 0.0,
        grid=grids[-1] if grids else None,
        curves=curves,
    )


def _curve(points: Sequence[tuple[int, float]]) -> Curve:
    """Scale finite values at iterations to the size of a curve."""
    values = [value for _, value in points]
    low = min(values)
    high = max(values)
    # A constant figure is drawn in the middle.
    bottom, top = (low, high) if high > low else (low - 0.5, high + 0.5)
    first = points[0][0]
    num_iterations = max(1, points[-1][0] - first)
    places = []
    for iteration, value in points:
        x = (iteration - first) / num_iterations * Curve.width
        y = Curve.height - (value - bottom) / (top - bottom) * Curve.height
        places.append(f"{x:.1f},{y:.1f}")
    return Curve(" ".join(places), f"{low:.3g} to {high:.3g}, last {values[-1]:.3g}")
