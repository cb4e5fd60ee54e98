"""What a drawing costs by pixels, steps and pictures at once, as curves on logarithmic axes.

A curve shows the cases in which nothing else differs. As both axes are logarithmic, a cost that
is proportional to pixels is a straight line at 45 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from twostep.reports.speed import Case, Row
from twostep.reports.starts import TORCH, Start

Points = list[tuple[float, float]]
"""Of one curve, by rising x."""

AXES = ("pixels", "steps", "batch")
"""What cases differ in."""

_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2")
_WIDE, _HIGH = 300, 200
_LEFT, _TOP = 64, 34
_GAP = 44


def along(axis: str, costs: Mapping[str, Sequence[tuple[Case, float]]]) -> dict[str, Points]:
    """Return the curves along one axis: costs of the cases that differ from the first in it alone.

    Args:
        axis: One of `AXES`.
        costs: By name, the cost of every case.

    Returns:
        By name, the points; nothing where there is one point only.
    """
    curves = {}
    for name, listed in costs.items():
        others = [each for each in AXES if each != axis]
        first = listed[0][0]
        points = sorted(
            (_value(case, axis), cost)
            for case, cost in listed
            if all(_value(case, other) == _value(first, other) for other in others)
        )
        if len(points) > 1:
            curves[name] = points
    return curves


def plot_curves(rows: Sequence[Row], starts: Sequence[Start] = ()) -> str | None:
    """Return an SVG of seconds, and of memory where starts were measured, along every axis.

    None where no axis has more than one value.
    """
    unit, per_second = "seconds", 1.0
    if all(row.total.median < 1 for row in rows):
        unit, per_second = "ms", 1e3
    seconds: dict[str, list[tuple[Case, float]]] = {}
    for row in rows:
        seconds.setdefault(row.name, []).append((row.case, per_second * row.total.median))
    memory: dict[str, list[tuple[Case, float]]] = {}
    for start in starts:
        if start.name != TORCH:
            memory.setdefault(start.name, []).append((start.case, start.peak_bytes / 2**20))
    names = list(dict.fromkeys([*seconds, *memory]))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    lines: list[list[str]] = []
    for what, costs in ((f"{unit} a drawing", seconds), ("MiB of a process", memory)):
        line = []
        for axis in AXES:
            curves = along(axis, costs)
            if curves:
                line.append(_panel(f"{what}, by {axis}", curves, colours))
        if line:
            lines.append(line)
    if not lines:
        return None
    wide = max(map(len, lines)) * (_LEFT + _WIDE + _GAP)
    high = len(lines) * (_TOP + _HIGH + _GAP)
    parts = []
    for number, line in enumerate(lines):
        for place, panel in enumerate(line):
            x = place * (_LEFT + _WIDE + _GAP)
            y = number * (_TOP + _HIGH + _GAP)
            parts.append(f'<g transform="translate({x},{y})">{panel}</g>')
    legend = []
    for number, (name, colour) in enumerate(colours.items()):
        x = 16 + 190 * (number % max(1, wide // 190))
        y = high + 16 + 20 * (number // max(1, wide // 190))
        legend.append(f'<rect x="{x}" y="{y - 9}" width="18" height="4" fill="{colour}"/>')
        legend.append(f'<text x="{x + 24}" y="{y - 3}">{name}</text>')
    whole = high + 30 + 20 * ((len(colours) - 1) // max(1, wide // 190))
    body = "\n".join([*parts, *legend])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{whole}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _value(case: Case, axis: str) -> float:
    if axis == "pixels":
        return float(case.size[0] * case.size[1])
    return float(case.steps if axis == "steps" else case.batch)


def _panel(title: str, curves: Mapping[str, Points], colours: Mapping[str, str]) -> str:
    """Return one plot: axes from the least to the largest value, and a line for each curve."""
    xs = sorted({x for points in curves.values() for x, _ in points})
    ys = [y for points in curves.values() for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    low, high = ticks[0], ticks[-1]

    def across(x: float) -> float:
        return _LEFT + _WIDE * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def down(y: float) -> float:
        return _TOP + _HIGH * (1 - math.log(y / low) / math.log(high / low))

    parts = [f'<text x="{_LEFT}" y="{_TOP - 12}" font-weight="bold">{title}</text>']
    for tick in ticks:
        y = down(tick)
        parts.append(
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _WIDE}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.6g}</text>'
        )
    under = _TOP + _HIGH + 18
    for x in xs:
        parts.append(f'<text x="{across(x):.1f}" y="{under}" text-anchor="middle">{x:,.0f}</text>')
    for name, points in curves.items():
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        )
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colours[name]}"/>'
            for x, y in points
        ]
    return "".join(parts)


def _ticks(least: float, most: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times powers of ten around and between values."""
    first = math.floor(math.log10(least))
    last = math.ceil(math.log10(most)) + 1
    numbers = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    start = max(i for i, number in enumerate(numbers) if number <= least)
    end = min(i for i, number in enumerate(numbers) if number >= most)
    return numbers[start : max(end, start + 1) + 1]
