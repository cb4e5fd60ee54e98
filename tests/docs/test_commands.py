"""What README and docs tell people to type: every `twostep` line parses, and the quick ones run as
they stand.
"""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app

ROOT = Path(__file__).parents[2]
LONG = ("pretrain", "distill", "cache", "report", "bench", "compare", "reproduce", "serve")
OF_OTHERS = ("mm_sd15_v2.safetensors", "v2_lora_ZoomIn.safetensors")
"""Files that a reader has, and tests have not."""

PLANNED = set[str]()
"""Plans that were made: they change nothing, so once is enough."""


def blocks() -> list[list[str]]:
    """The commands of each block: they may build on each other."""
    texts = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    # Their blocks follow on each other: test_use.py and test_extending.py run them in order.
    texts.remove(ROOT / "docs" / "use.md")
    texts.remove(ROOT / "docs" / "extending.md")
    found = [
        block
        for path in texts
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.S)
    ]
    lines = [[line.partition("#")[0].strip() for line in block.splitlines()] for block in found]
    return [
        block for each in lines if (block := [line for line in each if line.startswith("twostep ")])
    ]


def _takes_long(line: str) -> bool:
    """Whether a command plans, or compiles."""
    return line.startswith("twostep plan ") or "--engine openvino" in line


def block_cases() -> list[object]:
    """Return the blocks as cases of a test."""
    return [
        pytest.param(
            block,
            marks=[pytest.mark.slow] * any(map(_takes_long, block)),
        )
        for block in blocks()
    ]


@pytest.mark.parametrize("commands", block_cases(), ids=lambda commands: commands[0])
def test_a_documented_block_runs(
    commands: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    not_made: list[str] = []
    for command in commands:
        words = shlex.split(command)[1:]
        takes_long = words[0] in LONG
        # There is no run of which a moment could be exported, nor what a long command would make,
        # nor files of others.
        needs_more = "--at" in words or any(each in command for each in (*not_made, *OF_OTHERS))
        if takes_long and "--out" in words:
            not_made.append(words[words.index("--out") + 1])
        if takes_long or needs_more or command in PLANNED:
            words = [*words, "--help"]
        PLANNED.update([command] if words[0] == "plan" else [])
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, answer.output


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "apple.png").stat().st_size > 500


@pytest.mark.slow
def test_the_python_of_the_results_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/results.md").read_text(), re.S)
    exec(compile(block, "results.md", "exec"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1


@pytest.mark.parametrize(
    ("page", "expected"),
    [("README.md", {"demo", "test"}), ("CONTRIBUTING.md", {"setup", "test", "lint"})],
)
def test_the_make_targets_that_a_page_names_exist(page: str, expected: set[str]) -> None:
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert expected <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
