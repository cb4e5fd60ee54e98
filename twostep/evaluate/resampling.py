"""Scaling along one axis as a matrix: means weighted by triangles, as wide as what is coarser.

Two such matrices, one for rows and one for columns, scale a picture, or a part of it, to any size
without aliasing, for many pictures and places at once.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def triangle_weights(
    centres: Float[Tensor, "items targets"],
    width: Float[Tensor, " items"],
    num_sources: int,
    *,
    margin: int,
) -> Float[Tensor, "items targets num_sources"]:
    """Return how much each source sample adds to each target sample.

    Beyond the sources lie zeros, which take part in the mean.

    Args:
        centres: where the targets lie among the sources, whose centres are at 0.5, 1.5, ...
        width: half the base of the triangles, in sources; 1 or more.
        num_sources: number of sources.
        margin: how many zeros on either side are counted: at least the width, for every target
            that overlaps the sources.
    """
    places = torch.arange(-margin, num_sources + margin, device=centres.device) + 0.5
    distances = (places - centres[:, :, None]).abs()
    triangles = (1 - distances / width[:, None, None]).clamp(min=0)
    # Targets that see no source at all stay zero.
    total = triangles.sum(dim=2, keepdim=True).clamp(min=1)
    return (triangles / total)[:, :, margin : margin + num_sources]
