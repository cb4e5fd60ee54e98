"""How much the pictures of one prompt differ from seed to seed.

The mean distance between every two pictures of the same prompt, averaged over the prompts that have
at least two. A student that has lost modes draws the same picture from every noise, and this number
falls.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.errors import TwostepError


class DiversityError(TwostepError):
    """Pictures and prompts that do not belong together."""


def feature_diversity(
    features: Float[Tensor, "items features"], prompts: Sequence[Hashable]
) -> float | None:
    """Return the mean Euclidean distance between features of pictures of one prompt.

    None if no prompt has two pictures.
    """
    return _mean_distance(features, prompts)


def pixel_diversity(
    images: Float[Tensor, "items 3 height width"], prompts: Sequence[Hashable]
) -> float | None:
    """Return the root mean square difference per pixel value between pictures of one prompt.

    Pictures are in -1..1. None if no prompt has two of them.
    """
    pixels = images.flatten(1)
    distance = _mean_distance(pixels, prompts)
    if distance is None:
        return None
    return float(distance * pixels.shape[1] ** -0.5)


def _mean_distance(
    vectors: Float[Tensor, "items size"], prompts: Sequence[Hashable]
) -> float | None:
    if len(vectors) != len(prompts):
        raise DiversityError(
            f"got {len(vectors)} pictures and {len(prompts)} prompts; give one prompt per picture."
        )
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        members[prompt].append(index)
    groups = [group for group in members.values() if len(group) > 1]
    if not groups:
        return None
    means = [torch.pdist(vectors[group].double()).mean() for group in groups]
    return float(torch.stack(means).mean())
