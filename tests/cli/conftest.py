"""The command line as a user runs it, on a real model folder with random weights."""

from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from twostep.cli import app

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
