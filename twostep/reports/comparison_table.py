"""A comparison as Markdown, CSV and JSON.

Figures stand with what is known of their doubt: of one training the 95 % interval over prompts, of
several that differ in their seed alone the mean, the lowest and the highest.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twostep.evaluate.bootstrap import Estimate
from twostep.evaluate.metrics import Report, Score
from twostep.reports.benchmark import SETS
from twostep.reports.comparison import Comparison, Measured

Figure = Estimate | Score | float | int | None


@dataclass(frozen=True)
class Column:
    """One figure of the tables.

    Attributes:
        heading: of the column.
        meaning: for the page, how to read it and what is good.
        figure: takes it from a report.
        factor: what it is multiplied by.
        digits: after the point.
    """

    heading: str
    meaning: str
    figure: Callable[[Report], Figure]
    factor: float = 1.0
    digits: int = 1


_OFF_PALETTE = Column(
    "off palette, %",
    "pictures with a background that does not exist, of prompts that leave it open; less is better",
    lambda report: report.off_palette,
    factor=100.0,
)
_BACKGROUNDS = Column(
    "backgrounds",
    "total variation between the backgrounds drawn and the teacher's, where the prompt leaves them "
    "open: 0 is the same mixture, 1 another one altogether",
    lambda report: report.background_to_reference,
    digits=3,
)
_BACKGROUNDS_UNIFORM = Column(
    "to equal shares",
    "total variation between the backgrounds drawn and equal shares of all twelve",
    lambda report: report.background_to_uniform,
    digits=3,
)
_STYLES = Column(
    "styles",
    "the same as backgrounds for styles, where the prompt leaves them open",
    lambda report: report.style_to_reference,
    digits=3,
)
_DETAIL = Column(
    "fine detail, %",
    "energy of what a blur of one pixel takes away, of the teacher's; 100 is as much",
    lambda report: report.high_pass_ratio,
    factor=100.0,
)
_FRECHET = Column(
    "Frechet",
    "Frechet distance to the teacher's pictures from fresh noise, in the judge's features; the "
    "teacher's own is the floor",
    lambda report: report.frechet_to_reference,
    digits=2,
)
_KERNEL = Column(
    "kernel",
    "kernel distance (KID) to the same, which few pictures do not make larger; about 0 where there "
    "is no difference",
    lambda report: report.kernel_to_reference,
    digits=3,
)
_SECOND = Column(
    "kernel, second judge",
    "kernel distance in EfficientNet-Lite0's features, times 1,000",
    lambda report: report.second_kernel_to_reference,
    factor=1000.0,
    digits=1,
)
_LOYALTY = Column(
    "loyalty, %",
    "how far it draws what the teacher draws from the same noise: 100 is the same, 0 is as unlike "
    "as from other noise",
    lambda report: report.loyalty,
    factor=100.0,
    digits=0,
)
_CONCEPT = Column(
    "concept, %", "the judge sees the thing asked for", lambda r: r.concept, factor=100.0
)
_STYLE = Column("style, %", "and the style asked for", lambda r: r.style, factor=100.0)
_BACKGROUND = Column(
    "background, %", "and the background asked for", lambda r: r.background, factor=100.0
)
_DIVERSITY = Column(
    "diversity",
    "mean distance between pictures of one prompt, in the judge's features",
    lambda report: report.feature_diversity,
    digits=2,
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "open": (
        _OFF_PALETTE,
        _BACKGROUNDS,
        _BACKGROUNDS_UNIFORM,
        _STYLES,
        _DETAIL,
        _FRECHET,
        _KERNEL,
        _SECOND,
        _LOYALTY,
        _CONCEPT,
        _DIVERSITY,
    ),
    "complete": (
        _CONCEPT,
        _STYLE,
        _BACKGROUND,
        _DETAIL,
        _FRECHET,
        _KERNEL,
        _SECOND,
        _LOYALTY,
    ),
}
"""The columns of the table of each set of prompts."""

TITLES = {
    "open": "Open prompts: background or style is left to the model",
    "complete": "Complete prompts: thing, style and background are named",
}


@dataclass(frozen=True)
class Cell:
    """A value with its bounds, as text."""

    value: str
    bounds: str

    def __str__(self) -> str:
        """Return both in one line."""
        return f"{self.value} ({self.bounds})" if self.bounds else self.value


@dataclass(frozen=True)
class Line:
    """A line of a table: one row, or several that differ in their seed alone."""

    label: str
    calls: int
    cells: tuple[Cell, ...]


def columns(comparison: Comparison, name: str) -> list[Column]:
    """Return the columns of the table of a set; the second judge's only if there was one."""
    return [
        column for column in COLUMNS[name] if column is not _SECOND or comparison.has_second_judge
    ]


def lines(comparison: Comparison, name: str) -> list[Line]:
    """Return the lines of the table of a set."""
    chosen = columns(comparison, name)
    return [
        Line(
            _label(rows),
            rows[0].row.calls,
            tuple(_cell(column, [each.reports[name] for each in rows]) for column in chosen),
        )
        for rows in _groups(comparison)
    ]


def cost_lines(comparison: Comparison) -> list[Line]:
    """Return the lines of the table of costs; headings are `COST_HEADINGS`."""
    found = []
    for rows in _groups(comparison):
        training = rows[0].row.training
        cells = [_plain(f"{sum(each.seconds for each in rows) / len(rows):.3f}")]
        if training is None:
            cells += [_plain("")] * 4
        else:
            cells.append(_plain(_thousands(training.teacher_calls)))
            cells.append(_plain(_thousands(training.student_examples)))
            cells.append(_plain(_thousands(training.other_examples)))
            seconds = [each.row.training.seconds for each in rows if each.row.training]
            known = [value for value in seconds if value is not None]
            cells.append(_plain(f"{sum(known) / len(known) / 60:.0f}" if known else ""))
        found.append(Line(_label(rows), rows[0].row.calls, tuple(cells)))
    return found


COST_HEADINGS = (
    "seconds a picture",
    "training: teacher calls, thousands",
    "student examples, thousands",
    "other networks' examples, thousands",
    "minutes",
)


def to_markdown(comparison: Comparison) -> str:
    """Return all tables as Markdown, and how to read them."""
    parts = []
    for name in SETS:
        headings = [column.heading for column in columns(comparison, name)]
        parts += [f"### {TITLES[name]}", "", *_table(headings, lines(comparison, name)), ""]
    parts += ["### What it costs", "", *_table(COST_HEADINGS, cost_lines(comparison)), ""]
    parts += [*notes(comparison), ""]
    return "\n".join(parts)


def notes(comparison: Comparison) -> list[str]:
    """Return how to read the tables, in sentences."""
    sentences = [
        f"{comparison.num_pictures:,} pictures a row and set of prompts, from the same noise. In "
        "brackets: 95 % intervals over prompts; where several seeds were trained, their lowest and "
        "highest figure, beside the mean.",
        "Calls are network calls for one picture; guidance takes two a step. Distances are to the "
        "teacher's pictures of the same prompts from fresh noise, so the teacher's own line is the "
        "floor.",
        f"Seconds are for one picture alone on {comparison.machine}, prompt and decoding included.",
    ]
    if not comparison.has_second_judge:
        sentences.append(
            "The second judge's column is left out: get it with pip install "
            "'twostep[second-judge]'."
        )
    return sentences


def to_csv(comparison: Comparison) -> str:
    """Return every figure of every row, a line each: set, figure, value and bounds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["label", "source", "steps", "calls", "sampler", "set", "figure", "value", "low", "high"]
    )
    for measured in comparison.rows:
        row = measured.row
        for name in SETS:
            for figure, estimate in _figures(measured.reports[name]):
                writer.writerow(
                    [
                        row.label,
                        row.source,
                        row.steps,
                        row.calls,
                        row.sampler,
                        name,
                        figure,
                        estimate.value,
                        estimate.low,
                        estimate.high,
                    ]
                )
    return text.getvalue()


def to_json(comparison: Comparison) -> str:
    """Return everything that was measured, as indented JSON."""
    rows = []
    for measured in comparison.rows:
        row = measured.row
        rows.append(
            {
                "label": row.label,
                "source": row.source,
                "group": _number_of_group(comparison, row.group),
                "steps": row.steps,
                "calls": row.calls,
                "guidance": row.scale,
                "sampler": row.sampler,
                "seconds": measured.seconds,
                "training": None if row.training is None else asdict(row.training),
                "reports": {name: report.to_dict() for name, report in measured.reports.items()},
            }
        )
    values: dict[str, Any] = {
        "num_pictures": comparison.num_pictures,
        "machine": comparison.machine,
        "rows": rows,
    }
    return json.dumps(values, indent=2)


def _groups(comparison: Comparison) -> list[list[Measured]]:
    """Return rows by their group, in order of first appearance."""
    groups: dict[str, list[Measured]] = {}
    for measured in comparison.rows:
        groups.setdefault(measured.row.group, []).append(measured)
    return list(groups.values())


def _number_of_group(comparison: Comparison, group: str) -> int:
    return list(dict.fromkeys(each.row.group for each in comparison.rows)).index(group)


def _label(rows: Sequence[Measured]) -> str:
    first = rows[0].row
    if len(rows) == 1:
        return first.label
    return f"{first.label.removesuffix(f' ({first.source})')}, {len(rows)} seeds"


def _figures(report: Report) -> Iterator[tuple[str, Estimate]]:
    """Yield every figure of a report that was measured, with its bounds if it has any."""
    for name in report.__dataclass_fields__:
        estimate = _estimate(getattr(report, name))
        if estimate is not None:
            yield name, estimate


def _estimate(figure: Figure) -> Estimate | None:
    """Return any kind of figure as an estimate; None if it was not measured."""
    if isinstance(figure, Score):
        if figure.share is None:
            return None
        return Estimate(figure.share, figure.low, figure.high)
    if isinstance(figure, float | int):
        return Estimate(float(figure), None, None)
    return figure


def _cell(column: Column, reports: Sequence[Report]) -> Cell:
    """Return one figure of a row, or of several seeds."""
    estimates = [_estimate(column.figure(report)) for report in reports]
    known = [estimate for estimate in estimates if estimate is not None]
    if not known:
        return Cell("", "")
    values = [estimate.value for estimate in known]
    if len(known) > 1:
        low, high = min(values), max(values)
        return Cell(_text(column, sum(values) / len(values)), _bounds(column, low, high))
    if known[0].low is None or known[0].high is None:
        return Cell(_text(column, values[0]), "")
    return Cell(_text(column, values[0]), _bounds(column, known[0].low, known[0].high))


def _bounds(column: Column, low: float, high: float) -> str:
    return f"{_text(column, low)} to {_text(column, high)}"


def _text(column: Column, value: float) -> str:
    text = f"{column.factor * value:.{column.digits}f}"
    # No minus before a zero.
    return text.removeprefix("-") if float(text) == 0 else text


def _plain(text: str) -> Cell:
    return Cell(text, "")


def _thousands(count: float | int) -> str:
    return f"{count / 1000:,.0f}"


def _table(headings: Sequence[str], rows: Sequence[Line]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| | calls | " + " | ".join(headings) + " |"
    yield "|---|---:|" + "---:|" * len(headings)
    for row in rows:
        yield f"| {row.label} | {row.calls} | " + " | ".join(map(str, row.cells)) + " |"
