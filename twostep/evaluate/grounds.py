"""The ground of a picture: a colour at the top and one at the bottom, read from its border.

A ground is plain, or a vertical gradient of two colours. A line of colour over height is fitted to
the border, where what does not fit, as a thing that touches it, soon counts no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.palette import BORDER_PIXELS, OFF_PALETTE

_SCALES = (0.4, 0.2, 0.1, 0.1, 0.1)
"""Of each round of the fit, how far a colour may be off and still count, in -1..1."""


@dataclass(frozen=True, eq=False)
class Grounds:
    """The grounds of pictures: the colours of their first and last rows, in -1..1."""

    top: Float[Tensor, "items 3"]
    bottom: Float[Tensor, "items 3"]

    def names(self) -> list[tuple[str | None, str | None]]:
        """Return the names of both colours of every ground.

        None stands for a colour that is further than OFF_PALETTE from all that exist.
        """
        return list(zip(_named(self.top), _named(self.bottom), strict=True))

    def rows(self, heights: Float[Tensor, "items rows"]) -> Float[Tensor, "items 3 rows"]:
        """Return the colours at some heights, which go from 0, the first row, to 1, the last."""
        return torch.lerp(self.top[:, :, None], self.bottom[:, :, None], heights[:, None])


def fit_grounds(images: Float[Tensor, "items 3 height width"]) -> Grounds:
    """Return the grounds of pictures in -1..1 (iteratively reweighted least squares, Welsch)."""
    height, width = images.shape[-2:]
    border = BORDER_PIXELS
    is_border = torch.ones(height, width, dtype=torch.bool, device=images.device)
    is_border[border:-border, border:-border] = False
    colours = images.float()[:, :, is_border]
    heights = torch.linspace(0, 1, height, device=images.device)[:, None].expand(-1, width)
    # How much of a pixel is of the upper and of the lower colour.
    shares = torch.stack([1 - heights[is_border], heights[is_border]])
    ends = torch.stack(
        [
            images[:, :, :border].float().flatten(2).median(dim=2).values,
            images[:, :, -border:].float().flatten(2).median(dim=2).values,
        ],
        dim=1,
    )
    for scale in _SCALES:
        misses = (colours - (ends.transpose(1, 2) @ shares)).square().sum(dim=1)
        weights = torch.exp(-misses / (2 * scale**2)) + 1e-4
        weighted = shares * weights[:, None]
        ends = torch.linalg.solve(weighted @ shares.T, weighted @ colours.transpose(1, 2))
    return Grounds(ends[:, 0], ends[:, 1])


def _named(colours: Float[Tensor, "items 3"]) -> list[str | None]:
    levels = (colours + 1) * 127.5
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=levels.dtype, device=levels.device)
    distance, nearest = torch.cdist(levels, palette).min(dim=1)
    names = list(BACKGROUNDS)
    return [
        names[number] if is_near else None
        for number, is_near in zip(
            nearest.tolist(), (distance <= OFF_PALETTE).tolist(), strict=True
        )
    ]
