"""A run's log as it is found: whole lines, half ones, and damage that is JSON all the same."""

import json
from pathlib import Path

import pytest

from twostep.reports.comparison import _seconds_by_stage
from twostep.training.loop import LoopSettings
from twostep.training.run_folder import RunFolder
from twostep.training.run_log import read_log

GOOD = {"part": "4-regression", "iteration": 2, "seconds_per_iteration": 0.5, "loss": 0.25}

DAMAGED = [
    '{"part": "4-regression", "iterat',
    "null",
    "[1]",
    '{"iteration": 2}',
    '{"part": ["x"], "iteration": 2}',
    '{"part": "x", "iteration": "2"}',
    '{"part": "x", "iteration": null}',
    '{"part": "x", "iteration": 2, "seconds_per_iteration": "1"}',
    "[" * 100_000,
]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.jsonl") == ([], 0)


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_breaks_nothing_but_itself(line: str, tmp_path: Path) -> None:
    """Whoever reads a log: the page, the comparison, and the run that goes on."""
    path = tmp_path / "log.jsonl"
    last = {**GOOD, "iteration": 3, "picture": "samples/a\u2028b.png"}
    path.write_text(
        "\n".join([json.dumps(GOOD), line, json.dumps(last, ensure_ascii=False)]), encoding="utf-8"
    )
    assert read_log(path) == ([GOOD, last], 1)
    assert _seconds_by_stage(path) == {"4-regression": 0.5}
    loop = LoopSettings(iterations=1, batch_size=1, learning_rate=1e-3)
    folder = RunFolder(tmp_path, loop)
    assert folder.has_logged(part="4-regression", iteration=3)
    assert not folder.has_logged(part="4-regression", iteration=4)


def test_bytes_that_are_no_utf_8_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    assert read_log(tmp_path / "log.jsonl") == ([GOOD], 1)
