"""The Python of docs/video.md runs, and what it names is there."""

import re
from pathlib import Path

import pytest

import twostep.models.motion

ROOT = Path(__file__).parents[2]


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/video.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block, "video.md", "exec"), {})
    assert capsys.readouterr().out == "2 what a drawing says of itself\n"
    names = re.findall(r"`twostep\.models\.motion\.(\w+)`", page)
    assert names
    assert all(callable(getattr(twostep.models.motion, name)) for name in names)
