"""A random nano model, and a handful of real PNGs on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return random_bundle()


@pytest.fixture
def draw() -> Callable[..., Image.Image]:
    def noise(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return noise


@pytest.fixture
def pictures(tmp_path: Path, draw: Callable[..., Image.Image]) -> Path:
    """Five captioned pictures of three shapes in a folder and its subfolder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, (width, height) in enumerate(
        [(64, 64), (90, 80), (128, 64), (60, 120), (200, 100)]
    ):
        path = folder / ("more" if number > 2 else "") / f"{number}.png"
        draw(width, height, number).save(path)
        path.with_suffix(".txt").write_text(f"a red fox {number}")
    return folder
