"""A run as one page: phases, curves, grids, contracts, recipe. One HTML file that needs nothing else, also offline.

Everything comes from the run's folder, so a page can be made while the run goes on, and of a run that was killed.
"""

from __future__ import annotations

import base64
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from twostep.contract import Contract
from twostep.distill.recipe import Phase
from twostep.models.contracts import file_contract
from twostep.runs.folder import RunError, write_whole

WIDTH, HEIGHT = 280, 90
PACE = "seconds_per_iteration"
NOT_CURVES = {"time", "part", "iteration", "trouble", PACE}

STYLE = """
:root { color-scheme: light dark; --line: #4269d0; --rule: #8884; --quiet: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; font-weight: 400; }
th { color: var(--quiet); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem 2rem; } figure { margin: 0; }
figcaption { color: var(--quiet); font-size: .85rem; } img { max-width: 100%; image-rendering: pixelated; }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; } svg { border-bottom: 1px solid var(--rule); }
pre { overflow-x: auto; background: #8881; padding: 1rem; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Part:
    """One phase as the log tells it: the lines, and the latest grid."""

    name: str
    lines: tuple[dict[str, Any], ...]
    grid: Path | None

    @property
    def iteration(self) -> int:
        """The last iteration that was logged."""
        return int(self.lines[-1]["iteration"])

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Every figure over the iterations."""
        names = dict.fromkeys(name for line in self.lines for name in line if name not in NOT_CURVES)
        return {name: [(line["iteration"], line[name]) for line in self.lines if name in line] for name in names}


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path; RunError where there is no run."""
    record = folder / "run.toml"
    if not record.is_file():
        raise RunError(f"{folder} holds no run: it has no run.toml. Give the --out of a `twostep distill`.")
    recipe = record.read_text(encoding="utf-8")
    parts, wanted = _read_parts(folder), _iterations(recipe)
    students = [file_contract(path) for path in sorted((folder / "model").glob("students/*.safetensors"))]
    sections = [_overview(parts, wanted), *map(_part_section, parts)]
    if students:
        sections.append(_students_section(sorted(students, key=lambda contract: -contract.steps)))
    sections.append(f"<h2>Recipe</h2><pre>{escape(recipe)}</pre>")
    title = f"twostep: {escape(folder.resolve().name)}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{''.join(sections)}</body></html>"
    )
    with write_whole(folder / "report.html") as file:
        file.write(page.encode())
    return folder / "report.html"


def _read_parts(folder: Path) -> list[Part]:
    log = folder / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    # A killed run logs the iterations after its last checkpoint again: the later line counts.
    told: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        if "iteration" in line:
            told.setdefault(line["part"], {}).setdefault(line["iteration"], {}).update(line)
    parts = []
    for name, by_iteration in told.items():
        grids = sorted((folder / "samples").glob(f"{name}-[0-9]*.png"))
        parts.append(Part(name, tuple(by_iteration[i] for i in sorted(by_iteration)), grids[-1] if grids else None))
    return parts


def _iterations(recipe: str) -> dict[str, int]:
    phases = [Phase.model_validate(phase) for phase in tomllib.loads(recipe).get("phases", [])]
    return {phase.name: phase.iterations for phase in phases}


def _overview(parts: Sequence[Part], wanted: dict[str, int]) -> str:
    done = {part.name: part for part in parts}
    rows = []
    for name, iterations in wanted.items():
        part = done.get(name)
        seconds = next((line[PACE] for line in reversed(part.lines) if PACE in line), 0.0) if part else 0.0
        reached = part.iteration if part else 0
        minutes = f"{seconds * reached / 60:.1f}" if part else ""
        pace = f"{seconds:.2f}" if part else ""
        rows.append([escape(name), f"{reached} / {iterations}", pace, minutes])
    head = "".join(f"<th>{title}</th>" for title in ("phase", "iterations", "seconds each", "minutes"))
    body = "".join(
        f"<tr><td>{row[0]}</td>{''.join(f'<td class=number>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _part_section(part: Part) -> str:
    curves = "".join(_curve(name, points) for name, points in part.curves.items())
    grid = ""
    if part.grid is not None:
        data = base64.b64encode(part.grid.read_bytes()).decode()
        grid = (
            f'<figure><img alt="teacher above, student below" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(part.grid.name)}: teacher above, student below, the same noise</figcaption></figure>"
        )
    return f"<h2>{escape(part.name)}</h2><div class=curves>{curves}</div>{grid}"


def _curve(name: str, points: Sequence[tuple[int, float]]) -> str:
    """Draw one figure over the iterations, with its range and its last value."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    low, high = _range(y for _, y in finite)
    first, last = finite[0][0], finite[-1][0]
    places = " ".join(
        f"{(x - first) / max(1, last - first) * WIDTH:.1f},{HEIGHT - (y - low) / (high - low) * HEIGHT:.1f}"
        for x, y in finite
    )
    said = f"{name}: {_short(low)} to {_short(high)}, last {_short(finite[-1][1])}"
    return (
        f'<figure><svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 -2 {WIDTH} {HEIGHT + 4}" role="img">'
        f'<title>{escape(said)}</title><polyline points="{places}"/></svg>'
        f"<figcaption>{escape(said)}</figcaption></figure>"
    )


def _range(values: Iterable[float]) -> tuple[float, float]:
    known = list(values)
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _short(value: float) -> str:
    return f"{value:.3g}"


def _students_section(students: Sequence[Contract]) -> str:
    shown = "".join(
        f"<details><summary>{escape(contract.name)}</summary><pre>{escape(contract.to_json())}</pre></details>"
        for contract in students
    )
    return f"<h2>Students and their contracts</h2>{shown}"
