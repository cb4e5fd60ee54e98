"""Runs as one page: stages, curves, samples, contracts, environment, recipe.

The page is one HTML file that needs nothing else. Everything comes from the runs' folders, so it
can be made while a run goes on, and of a run that was killed. How it looks is in `run_page.html`,
how its charts behave in `run_page.js`; uPlot, which draws them, travels inside the page.
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
from twostep.distill.decoder.recipe import DecoderStage
from twostep.distill.recipe import Stage, TrainedStage
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.training.recipe import recipe_text
from twostep.training.run_folder import RunError
from twostep.training.run_log import SECONDS, Line, read_log

NOT_CURVES = {"time", "part", "iteration", "trouble", "picture", SECONDS}
"""What lines of the log hold beside figures."""

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One stage of a run as its log has it.

    Args:
        name: of the stage.
        iteration: the last one in the log.
        pace: seconds per iteration.
        grid: the latest samples; None if there are none yet.
        curves: finite values by figure and iteration; a figure that was never finite has none.
    """

    name: str
    iteration: int
    pace: float
    grid: Path | None
    curves: dict[str, dict[int, float]]


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Args:
        name: of the folder.
        recipe: in TOML.
        stages: how many iterations each stage has.
        parts: the stages that have begun, by name.
        environments: on what it ran, each once.
        students: contracts of what it released, that of the most steps first.
        unreadable: lines of the log that are no JSON, such as the half line of a killed run.
    """

    name: str
    recipe: str
    stages: dict[str, int]
    parts: dict[str, Part]
    environments: list[Line]
    students: list[Contract]
    unreadable: int


@dataclass(frozen=True)
class Chart:
    """One figure of one stage, of every run that has it.

    Args:
        stage: its name.
        figure: its name.
        runs: name of a run -> its values by iteration.
    """

    stage: str
    figure: str
    runs: dict[str, dict[int, float]]

    @property
    def summary(self) -> str:
        """The figure, with its least, largest and last value in every run."""
        ranges = [_range(values) for values in self.runs.values()]
        if len(ranges) == 1:
            return f"{self.figure}: {ranges[0]}"
        named = (f"{run} {words}" for run, words in zip(self.runs, ranges, strict=True))
        return f"{self.figure}: {'; '.join(named)}"

    def to_json(self) -> dict[str, Any]:
        """Return the chart as `run_page.js` wants it: all runs over the same iterations."""
        x = sorted({iteration for values in self.runs.values() for iteration in values})
        runs = [
            {"name": name, "y": [values.get(iteration) for iteration in x]}
            for name, values in self.runs.items()
        ]
        return {"stage": self.stage, "figure": self.figure, "x": x, "runs": runs}


@dataclass(frozen=True)
class StageOnPage:
    """A stage with its charts, and the latest samples of every run that has some."""

    name: str
    charts: list[Chart]
    grids: list[tuple[Run, Path]]


def write_report(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Args:
        folder: of the run.
        others: folders of runs whose curves are drawn over those of the first.

    Raises:
        RunError: a folder holds no run.
    """
    runs = _renamed([_read_run(path) for path in (folder, *others)])
    stages = _stages_on_page(runs)
    curves = json.dumps([chart.to_json() for stage in stages for chart in stage.charts])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.from_string(_text("run_page.html")).render(
        title=f"twostep: {', '.join(run.name for run in runs)}",
        runs=runs,
        stages=stages,
        charts=any(stage.charts for stage in stages),
        encoded=_encoded,
        environments=_unique(line for run in runs for line in run.environments),
        students=[contract for run in runs for contract in run.students],
        # Inside of a script element nothing ends it but its end tag.
        curves=curves.replace("<", "\\u003c"),
        library=_text("uplot/uPlot.iife.min.js"),
        library_style=_text("uplot/uPlot.min.css"),
        script=_text("run_page.js"),
    )
    with write_atomically(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _range(values: dict[int, float]) -> str:
    last = values[max(values)]
    return f"{min(values.values()):.3g} to {max(values.values()):.3g}, last {last:.3g}"


def _read_run(folder: Path) -> Run:
    record = folder / "run.toml"
    if not record.is_file():
        raise RunError(
            f"{folder} holds no run: it has no run.toml. Give the --out of a `twostep distill`."
        )
    recipe = recipe_text(record)
    lines, num_unreadable = read_log(folder / "log.jsonl")
    parts = _read_parts(lines, folder)
    environments = [
        {key: value for key, value in line.items() if key not in NOT_CURVES}
        for line in lines
        if line["part"] == "environment"
    ]
    return Run(
        name=folder.resolve().name,
        recipe=recipe,
        stages=_iterations_by_stage(recipe, parts),
        parts=parts,
        environments=_unique(environments),
        students=_students(folder),
        unreadable=num_unreadable,
    )


def _renamed(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with names that differ."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else Run(**{**vars(run), "name": f"{run.name} ({i})"})
        for i, run in enumerate(runs, start=1)
    ]


def _iterations_by_stage(recipe: str, parts: dict[str, Part]) -> dict[str, int]:
    """Return how many iterations each stage has; of a recipe before stages, what the log has."""
    try:
        values = tomllib.loads(recipe)
        stages: list[TrainedStage]
        if "decoder" in values:
            stages = [DecoderStage.model_validate(values["decoder"])]
        elif "stages" in values:
            stages = [Stage.model_validate(stage) for stage in values["stages"]]
        else:
            return {name: part.iteration for name, part in parts.items()}
    except (tomllib.TOMLDecodeError, TypeError, ValidationError) as error:
        raise RunError(f"the recipe of this run cannot be read: {error}") from error
    return {stage.name: stage.iterations for stage in stages}


def _unique(lines: Iterable[Line]) -> list[Line]:
    """Return every line once."""
    unique: list[Line] = []
    for line in lines:
        if line not in unique:
            unique.append(line)
    return unique


def _students(folder: Path) -> list[Contract]:
    """Return the contracts of the released students, that of the most steps first."""
    paths = sorted((folder / "model").glob("students/*.safetensors"))
    contracts = [resolve(path).contract for path in paths]
    return sorted(contracts, key=lambda contract: -contract.steps)


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _stages_on_page(runs: Sequence[Run]) -> list[StageOnPage]:
    """Return every stage of any run, with its figures laid over each other."""
    stages = []
    for name in dict.fromkeys(name for run in runs for name in run.parts):
        having = [(run, run.parts[name]) for run in runs if name in run.parts]
        figures = dict.fromkeys(figure for _, part in having for figure in part.curves)
        charts = []
        for figure in figures:
            curves = {
                run.name: part.curves[figure] for run, part in having if figure in part.curves
            }
            charts.append(Chart(name, figure, curves))
        grids = [(run, part.grid) for run, part in having if part.grid is not None]
        stages.append(StageOnPage(name, charts, grids))
    return stages


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
        values = {
            line["iteration"]: float(line[figure]) for line in lines if _is_finite(line.get(figure))
        }
        if values:
            curves[figure] = values
    paces = [line[SECONDS] for line in lines if SECONDS in line]
    grids = sorted((folder / "samples").glob(f"{name}-[0-9]*.png"))
    return Part(
        name=name,
        iteration=lines[-1]["iteration"],
        pace=paces[-1] if paces else 0.0,
        grid=grids[-1] if grids else None,
        curves=curves,
    )


def _is_finite(value: Any) -> bool:
    """Return whether a value of the log is a number that can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)
