"""A run as one page: phases, curves, grids, contracts, environment, recipe. One HTML file that
needs nothing else.

Everything comes from the run's folder, so a page can be made while the run goes on, and of a run
that was killed. How the page looks is in `report.html`.
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

from twostep.distill.recipe import Phase
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.training.run_folder import RunError

PACE = "seconds_per_iteration"
NOT_CURVES = {"time", "part", "iteration", "trouble", PACE}


@dataclass(frozen=True)
class Curve:
    """One figure over the iterations as the points of a line, and in words."""

    points: str
    said: str
    width: int = 280
    height: int = 90


@dataclass(frozen=True)
class Part:
    """One phase as the log tells it: its last iteration, the seconds of one, the latest grid, and
    all curves by name.

    A figure that was never finite has no curve.
    """

    name: str
    iteration: int
    pace: float
    grid: Path | None
    curves: dict[str, Curve]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; RunError where there is no run."""
    record = folder / "run.toml"
    if not record.is_file():
        raise RunError(
            f"{folder} holds no run: it has no run.toml. Give the --out of a `twostep distill`."
        )
    recipe, log = record.read_text(encoding="utf-8"), folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    students = [
        resolve(path).contract for path in sorted((folder / "model").glob("students/*.safetensors"))
    ]
    phases = [Phase.model_validate(phase) for phase in tomllib.loads(recipe).get("phases", [])]
    here = [line for line in lines if line["part"] == "environment"]
    told = [{key: line[key] for key in line if key not in NOT_CURVES} for line in here]
    template = Path(__file__).with_name("run_page.html").read_text()
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        template
    )
    text = page.render(
        title=f"twostep: {folder.resolve().name}",
        phases={phase.name: phase.iterations for phase in phases},
        parts=_read_parts(lines, folder),
        encoded=lambda path: base64.b64encode(path.read_bytes()).decode(),
        environments=[
            environment for i, environment in enumerate(told) if environment not in told[:i]
        ],
        students=sorted(students, key=lambda contract: -contract.steps),
        recipe=recipe,
    )
    with write_atomically(folder / "report.html") as file:
        file.write(text.encode())
    return folder / "report.html"


def _read_parts(lines: Iterable[dict[str, Any]], folder: Path) -> dict[str, Part]:
    # A killed run logs the iterations after its last checkpoint again: the later line counts.
    told: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if "iteration" in line:
            told.setdefault(line["part"], {}).setdefault(line["iteration"], {}).update(line)
    return {
        name: _read_part(name, [by[i] for i in sorted(by)], folder) for name, by in told.items()
    }


def _read_part(name: str, lines: Sequence[dict[str, Any]], folder: Path) -> Part:
    figures = dict.fromkeys(figure for line in lines for figure in line if figure not in NOT_CURVES)
    curves = {}
    for figure in figures:
        if points := [
            (line["iteration"], line[figure])
            for line in lines
            if math.isfinite(line.get(figure, math.nan))
        ]:
            curves[figure] = _curve(points)
    pace = next((line[PACE] for line in reversed(lines) if PACE in line), 0.0)
    grids = sorted((folder / "samples").glob(f"{name}-[0-9]*.png"))
    return Part(name, lines[-1]["iteration"], pace, grids[-1] if grids else None, curves)


def _curve(points: Sequence[tuple[int, float]]) -> Curve:
    """Scale finite values to the size of a curve."""
    values = [y for _, y in points]
    low, high = min(values), max(values)
    bottom, top = (low, high) if high > low else (low - 0.5, high + 0.5)
    first, span = points[0][0], max(1, points[-1][0] - points[0][0])
    places = (
        f"{(x - first) / span * Curve.width:.1f},{Curve.height - (y - bottom) / (top - bottom) * Curve.height:.1f}"
        for x, y in points
    )
    return Curve(" ".join(places), f"{low:.3g} to {high:.3g}, last {values[-1]:.3g}")
