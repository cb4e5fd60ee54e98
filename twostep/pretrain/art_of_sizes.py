"""The drawings that a built-in size learns from."""

from __future__ import annotations

from pathlib import Path

from twostep.pretrain.drawings import BUILT_IN, DrawingSet, load_drawings
from twostep.pretrain.sizes import ModelSize
from twostep.pretrain.vectors import MINI, load_rendered, load_vectors


def find_drawings(size: ModelSize, folder: Path | None = None) -> DrawingSet:
    """Load the drawings of a folder, or those in the package that a size learns from.

    Args:
        size: of the model; what learns from scenes has vector drawings, which are rendered as large
            as its pictures.
        folder: of other drawings, as `twostep drawings` writes them.
    """
    if folder is not None or size.learns_from == "drawings":
        return load_drawings(folder or BUILT_IN)
    return load_rendered(load_vectors(MINI), size.pixels)
