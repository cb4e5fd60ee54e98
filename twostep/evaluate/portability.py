"""Which strength of a few-step LoRA suits a base that it was not distilled on: its pictures against the base's own.

Pictures of the same prompts and seeds lie side by side. `apart` is how far each is from the base's own; it forgives
blur, for a mean is near to everything. `looks` is the Frechet distance in features that need no download and see blur:
mean colour, and how much detail there is at every size. Neither knows what a picture shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from twostep.evaluate.frechet import fit_features, frechet_distance

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
Pictures = Float[Tensor, "items 3 height width"]


@dataclass(frozen=True)
class Likeness:
    """How far pictures are from others of the same prompts and seeds: as pairs, and as a set."""

    apart: float
    looks: float


def compare(pictures: Pictures, own: Pictures, features: Callable[[Tensor], Tensor] | None = None) -> Likeness:
    """Compare pictures in -1..1: root mean square difference of a pair, and Frechet distance in features."""
    see = features or looks
    apart = (pictures - own).square().mean(dim=(1, 2, 3)).sqrt().mean()
    return Likeness(float(apart), frechet_distance(fit_features(see(pictures)), fit_features(see(own))))


def looks(pictures: Pictures) -> Float[Tensor, "items features"]:
    """Return mean colour, and by colour the strength of detail of 2, 4, 8 ... pixels: a Laplacian pyramid."""
    features = [pictures.mean(dim=(2, 3))]
    while min(pictures.shape[2:]) >= 4:
        coarse = avg_pool2d(pictures, 2)
        smooth = interpolate(coarse, size=pictures.shape[2:])
        features.append((pictures - smooth).square().mean(dim=(2, 3)).sqrt())
        pictures = coarse
    return torch.cat(features, dim=1)


def best_scale(found: Mapping[float, Likeness]) -> float:
    """Return the scale whose pictures are nearest."""
    return min(found, key=lambda scale: found[scale].apart)
