"""docs/use.md runs from top to bottom in one folder: what one block draws, the next one changes."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app

USE = Path(__file__).parents[2] / "docs" / "use.md"


def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(bash|python)\n(.*?)```", USE.read_text(), re.S)
    assert len(blocks) > 8
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "use.md", "exec"), {})
            continue
        for line in block.splitlines():
            answer = CliRunner().invoke(app, shlex.split(line)[1:])
            assert answer.exit_code == 0, f"{line}\n{answer.output}"
    with Image.open("preview2.png") as preview, Image.open("edited.png") as edited:
        assert (preview.size, edited.size) == ((64, 64), (64, 64))
    assert len(list(tmp_path.glob("out/**/*.png"))) == 19
