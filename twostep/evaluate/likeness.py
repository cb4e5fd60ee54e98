"""Features of pictures that need no download, for the Frechet distance: they see colour and blur,
not what is shown.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate


def looks(pictures: Float[Tensor, "items 3 height width"]) -> Float[Tensor, "items features"]:
    """Return mean colour, and by colour the strength of details of 2, 4, 8 ... pixels: a Laplacian
    pyramid.
    """
    features = [pictures.mean(dim=(2, 3))]
    while min(pictures.shape[2:]) >= 4:
        coarse = avg_pool2d(pictures, 2)
        features.append(
            (pictures - interpolate(coarse, size=pictures.shape[2:]))
            .square()
            .mean(dim=(2, 3))
            .sqrt()
        )
        pictures = coarse
    return torch.cat(features, dim=1)
