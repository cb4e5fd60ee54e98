"""A run's log.jsonl, as it is found: also of a run that was killed while it wrote a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SECONDS = "seconds_per_iteration"
"""The figure beside those of an iteration that says how long one took on average."""

Line = dict[str, Any]
"""The values of one line by their names."""


def read_log(path: Path) -> tuple[list[Line], int]:
    """Return the lines of a log in order, and how many were none, as the last one of a killed run.

    Args:
        path: of the log; none at all is an empty one.
    """
    if not path.is_file():
        return [], 0
    lines = []
    num_unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if _is_line(values):
            lines.append(values)
        else:
            num_unreadable += 1
    return lines, num_unreadable


def _is_line(values: Any) -> bool:
    """Tell whether JSON is a line of a log; a damaged one may be JSON all the same."""
    return (
        isinstance(values, dict)
        and isinstance(values.get("part"), str)
        and isinstance(values.get("iteration", 0), int)
        and isinstance(values.get(SECONDS, 0.0), (int, float))
    )
