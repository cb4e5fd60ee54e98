"""Curves show what differs in one thing alone, to scale on both axes."""

import re

import pytest

from twostep.reports.curves import along, plot_curves
from twostep.reports.speed import Case, Row, Timing
from twostep.reports.starts import TORCH, Start

CASES = [
    Case(2, (64, 64), 1),
    Case(4, (64, 64), 1),
    Case(2, (128, 64), 1),
    Case(2, (128, 128), 1),
    Case(4, (128, 128), 4),
]


def test_what_differs_in_one_thing_alone() -> None:
    costs = {"a": [(case, float(number)) for number, case in enumerate(CASES)]}
    assert along("steps", costs) == {"a": [(2, 0.0), (4, 1.0)]}
    assert along("pixels", costs) == {"a": [(4096, 0.0), (8192, 2.0), (16384, 3.0)]}
    assert along("batch", costs) == {}


def test_a_cost_in_proportion_is_a_line_of_one_slope() -> None:
    rows = [
        Row("a", case, {"total": Timing((1e-6 * case.size[0] * case.size[1],))})
        for case in (CASES[0], CASES[2], CASES[3])
    ]
    drawn = plot_curves(rows)
    assert drawn is not None and drawn.startswith("<svg")
    (path,) = re.findall(r'points="([^"]+)"', drawn)
    places = [tuple(map(float, each.split(","))) for each in path.split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)
    assert y1 - y2 == pytest.approx(y0 - y1, abs=0.2)
    assert y1 < y0


def test_memory_has_plots_of_its_own_and_torch_none() -> None:
    starts = [
        Start(name, case, Timing((1.0,)), 2**28) for case in CASES[:2] for name in ("eager", TORCH)
    ]
    rows = [Row("eager", case, {"total": Timing((0.1,))}) for case in CASES[:2]]
    drawn = plot_curves(rows, starts)
    assert drawn is not None
    assert re.findall(r">([^<]+, by \w+)<", drawn) == [
        "ms a drawing, by steps",
        "MiB of a process, by steps",
    ]
    assert TORCH not in drawn
    assert plot_curves(rows[:1]) is None
