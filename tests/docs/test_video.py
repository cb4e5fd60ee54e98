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
    first, second = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(first, "video.md", "exec"), {})
    assert capsys.readouterr().out == "2 what a drawing says of itself\n"
    # Whose module is adopted is not there: it needs to parse, and its function to be there.
    compile(second, "video.md", "exec")
    (name,) = re.findall(r"^(\w+)\($", second, re.M)
    assert callable(getattr(twostep.models.motion, name))
