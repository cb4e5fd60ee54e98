"""Features of pictures that need no download, for the Frechet distance.

They see colour and blur, not what is shown.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

_SMALLEST_SIDE = 4
"""Pictures with a shorter side are not halved any more."""


def looks(pictures: Float[Tensor, "items 3 height width"]) -> Float[Tensor, "items features"]:
    """Return mean colour, and by colour the strength of details of 2, 4, 8 ... pixels.

    These are the root mean squares of the levels of a Laplacian pyramid.
    """
    features = [pictures.mean(dim=(2, 3))]
    while min(pictures.shape[2:]) >= _SMALLEST_SIDE:
        coarse = avg_pool2d(pictures, 2)
        details = pictures - interpolate(coarse, size=pictures.shape[2:])
        features.append(details.square().mean(dim=(2, 3)).sqrt())
        pictures = coarse
    return torch.cat(features, dim=1)
