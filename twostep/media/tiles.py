"""Pictures decoded tile by tile, which takes the memory of one tile.

Tiles overlap and are faded into each other. Near its rim a tile does not see what lies beyond, so
the outermost quarter of an overlap counts for nothing, and the weight rises in the half between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.diffusion.shapes import Latents

OVERLAP = 0.25
"""The share of a tile's side that its neighbour covers too."""


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Latents, side: int
) -> Float[Tensor, "batch 3 height width"]:
    """Decode latents in square tiles.

    Args:
        decode: From latents to pictures; all tiles have the same size.
        latents: Of whole pictures.
        side: Of a tile, in latents; at least 8.

    Returns:
        The pictures: those of `decode`, but for what it sees from farther away than an eighth of a
        tile.
    """
    height, width = latents.shape[-2:]
    rows, columns = min(side, height), min(side, width)
    total: Tensor | None = None
    for top in _starts(height, rows):
        for left in _starts(width, columns):
            picture = decode(latents[..., top : top + rows, left : left + columns])
            scale = picture.shape[-2] // rows
            if total is None:
                shape = (*picture.shape[:2], scale * height, scale * width)
                total = picture.new_zeros(shape)
                weights = picture.new_zeros(shape[2:])
            weight = torch.outer(
                _weights(rows, top, height, scale), _weights(columns, left, width, scale)
            ).to(picture)
            place = (
                slice(scale * top, scale * (top + rows)),
                slice(scale * left, scale * (left + columns)),
            )
            total[..., place[0], place[1]] += weight * picture
            weights[place] += weight
    assert total is not None, "there is always a first tile"
    return total / weights


def _starts(length: int, side: int) -> list[int]:
    """Return where tiles begin, the last of them flush with the end."""
    if side >= length:
        return [0]
    step = side - max(1, int(OVERLAP * side))
    return [*range(0, length - side, step), length - side]


def _weights(side: int, start: int, length: int, scale: int) -> Tensor:
    """Return the weight of every pixel along one side of a tile.

    It is 1 in the middle and up to the rims of the picture, and 0 at the rims within.
    """
    overlap = scale * max(1, int(OVERLAP * side))
    distances = torch.arange(scale * side) + 0.5
    rising = ((distances - overlap / 4) / (overlap / 2)).clamp(0, 1)
    weights = torch.ones(scale * side)
    if start > 0:
        weights = weights * rising
    if start + side < length:
        weights = weights * rising.flip(0)
    return weights
