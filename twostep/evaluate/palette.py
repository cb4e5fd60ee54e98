"""Is the background of a picture one of those that exist?

Real pictures of the built-in set lie on one of twelve plain colours. A student that averages over
what it should choose between draws a colour in between, which a classifier still calls by the name
of its nearest neighbour; this measure sees it. It looks at pixels alone and needs no network.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS

OFF_PALETTE = 25.0
"""A border further than this from every background, in RGB levels of 0..255, is off the palette.

The two nearest backgrounds, green and teal, are 76 apart, so nothing is near two of them. Five of
the 66 mixtures of two backgrounds in equal parts lie near a third (black and white make gray), so
the share counts a little less than what is mixed.
"""

BORDER_PIXELS = 3
"""How wide the border is; drawings keep away from it."""


def border_colour(
    images: Float[Tensor, "items 3 height width"],
) -> Float[Tensor, "items 3"]:
    """Return the median of each colour channel over the border of pictures.

    The median is not moved by a drawing that touches the border here and there.

    Args:
        images: pictures in -1..1, of more than six pixels each way.

    Returns:
        RGB levels in 0..255.
    """
    levels = ((images.float() + 1) * 127.5).clamp(0, 255)
    width = BORDER_PIXELS
    between = levels[:, :, width:-width]
    sides = (
        levels[:, :, :width],
        levels[:, :, -width:],
        between[..., :width],
        between[..., -width:],
    )
    border = torch.cat([side.flatten(2) for side in sides], dim=2)
    return border.median(dim=2).values


def palette_distance(
    images: Float[Tensor, "items 3 height width"],
) -> Float[Tensor, " items"]:
    """Return how far the border's colour is from the nearest background that exists.

    It is the Euclidean distance in RGB, from 0 to 442, in levels of 0..255. Pictures are in -1..1.
    A picture is *off the palette* beyond `OFF_PALETTE`.
    """
    return _distances(images).min(dim=1).values


def nearest_background(
    images: Float[Tensor, "items 3 height width"],
) -> Int[Tensor, " items"]:
    """Return the background that the border's colour is nearest to, as its place in `BACKGROUNDS`.

    Pictures are in -1..1.
    """
    return _distances(images).argmin(dim=1)


def _distances(
    images: Float[Tensor, "items 3 height width"],
) -> Float[Tensor, "items backgrounds"]:
    """Return how far the border's colour is from every background, in RGB levels."""
    colours = border_colour(images)
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=colours.dtype, device=colours.device)
    return torch.cdist(colours, palette)
