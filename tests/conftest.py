"""Shapes in signatures are checked in every test, one worker uses one thread, and what several
rooms' tests draw and judge is made once.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TWOSTEP_SERVER"] = "off"  # nothing is handed to a server that happens to run

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import config, install_import_hook

install_import_hook(["twostep"], "beartype.beartype")

if TYPE_CHECKING:
    from twostep.evaluate.judge import Judge
    from twostep.pretrain.drawings import DrawingSet

SAMPLE = Path(__file__).parent / "pretrain" / "sample"


@pytest.fixture(scope="session")
def emoji() -> "DrawingSet":
    """A sample of the built-in drawings, half as large."""
    from twostep.pretrain.drawings import load_drawings

    return load_drawings(SAMPLE)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leaves shapes in signatures unchecked, for torch.compile cannot trace the checks."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def judge() -> "Judge":
    """The judge that ships."""
    from twostep.evaluate.judge import load_judge

    return load_judge()
