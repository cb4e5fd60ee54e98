"""How near pictures come to others of the same prompts and noise, in what needs no judge and no download.

`difference` compares picture by picture; it forgives blur, for a mean is near to everything. `looks_distance` is the
Frechet distance in features that see blur: mean colour, and how much detail there is at every size. Neither knows what
a picture shows.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from twostep.evaluate.frechet import fit_features, frechet_distance

Pictures = Float[Tensor, "items 3 height width"]


def difference(pictures: Pictures, others: Pictures) -> float:
    """Return the root mean square difference of a pair per pixel value, for values in -1..1, averaged over pairs."""
    return float((pictures - others).square().mean(dim=(1, 2, 3)).sqrt().mean())


def looks_distance(pictures: Pictures, others: Pictures) -> float:
    """Return the Frechet distance between the looks of two sets of at least two pictures each."""
    return frechet_distance(fit_features(_looks(pictures)), fit_features(_looks(others)))


def _looks(pictures: Pictures) -> Float[Tensor, "items features"]:
    """Return mean colour, and by colour the strength of details of 2, 4, 8 ... pixels: a Laplacian pyramid."""
    features = [pictures.mean(dim=(2, 3))]
    while min(pictures.shape[2:]) >= 4:
        coarse = avg_pool2d(pictures, 2)
        details = pictures - interpolate(coarse, size=pictures.shape[2:])
        features.append(details.square().mean(dim=(2, 3)).sqrt())
        pictures = coarse
    return torch.cat(features, dim=1)
