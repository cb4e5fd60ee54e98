"""Style, types and floors, by the same commands as `make lint`."""

import subprocess
import sys
from pathlib import Path

import pytest

LINTERS = {
    "style": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "floors": ["lint-imports", "--no-logo"],
}


@pytest.mark.parametrize("what", LINTERS)
def test_lint(root, what):
    tool, *arguments = LINTERS[what]
    command = [str(Path(sys.executable).parent / tool), *arguments]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
