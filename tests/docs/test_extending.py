"""docs/extending.md runs from top to bottom: its files are written, then its commands are run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


def run(line: str, folder: Path) -> str:
    """Run one line of a shell block in a folder, and return what it prints."""
    program, *words = shlex.split(line)
    if program == "twostep":
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, f"{line}\n{answer.output}"
        return answer.output
    # A script may change the package's own application, so it runs in a process of its own.
    assert program == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    printed = {}
    for language, title, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if title:
            path = tmp_path / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block, encoding="utf-8")
        elif language == "bash":
            for line in block.splitlines():
                printed[line] = run(line, tmp_path)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) is None:
            continue
        if Path(str(sys.modules[name].__file__)).is_relative_to(tmp_path):
            del sys.modules[name]
    (colour,) = (text for line, text in printed.items() if line.startswith("python verbs.py"))
    assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)\n", colour)
    assert "4-huber" in printed["twostep plan huber.toml"]
    assert list(tmp_path.glob("out/*.png"))
    curves = printed["python distil_waves.py"].splitlines()
    assert len(curves) == 2
    for curve in curves:
        assert len(json.loads((tmp_path / curve).read_text())["values"]) == 32
    difference = printed["python channels_last.py"]
    assert re.fullmatch(r"\d+ of 255\n", difference)
    assert int(difference.split()[0]) <= 2
