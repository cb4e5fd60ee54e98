"""How much fine detail pictures hold, in pixels alone."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

SIGMA_PIXELS = 1.0
"""Standard deviation of the Gaussian whose loss is measured."""

_REACH = 3
"""The Gaussian is cut off this many pixels from its centre."""


def high_pass_energy(
    images: Float[Tensor, "items 3 height width"],
) -> Float[Tensor, " items"]:
    """Return the mean square of what a Gaussian of one pixel takes away from each picture.

    For pictures in -1..1 it lies in 0..4: 0 for a plain colour, and less for a blurred picture than
    for the sharp one. Noise raises it as edges do, so it says how much detail there is, not that
    the detail is right: read it beside the teacher's.
    """
    pixels = images.float()
    grid = torch.arange(-_REACH, _REACH + 1, dtype=pixels.dtype, device=pixels.device)
    line = torch.exp(-grid.square() / (2 * SIGMA_PIXELS**2))
    line = line / line.sum()
    padded = functional.pad(pixels, (_REACH,) * 4, mode="replicate")
    # A Gaussian is separable: along rows, then along columns.
    rows = functional.conv2d(padded, line.expand(3, 1, 1, -1), groups=3)
    smooth = functional.conv2d(rows, line[:, None].expand(3, 1, -1, 1), groups=3)
    return (pixels - smooth).square().mean(dim=(1, 2, 3))
