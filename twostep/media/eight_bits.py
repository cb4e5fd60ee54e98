"""Pictures in 8 bits, without PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def eight_bits(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pictures in -1..1 in levels of 0..255; what lies beyond is cut off."""
    levels = np.rint((pictures + np.float32(1)) * np.float32(127.5)).clip(0, 255)
    rounded: NDArray[np.uint8] = levels.astype(np.uint8)
    return rounded


def images(levels: NDArray[Any]) -> list[Image.Image]:
    """Return pictures [batch, 3, height, width] in levels of 0..255 as images."""
    return [Image.fromarray(np.ascontiguousarray(each.transpose(1, 2, 0))) for each in levels]
