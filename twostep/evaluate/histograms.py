"""Which classes pictures fall into, and how far two such histograms lie apart.

A model that has lost modes, or that prefers some, draws another mixture of backgrounds and styles
than its teacher where the prompt leaves them open.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.errors import TwostepError


class HistogramError(TwostepError):
    """There is nothing to count."""


def histogram(classes: Int[Tensor, " items"], num_classes: int) -> Float[Tensor, " classes"]:
    """Return the share of the items in each class, adding up to 1; HistogramError for no items."""
    if len(classes) == 0:
        raise HistogramError("there are no pictures to count; give at least one.")
    return torch.bincount(classes, minlength=num_classes).double() / len(classes)


def total_variation(
    p: Float[Tensor, "*batch classes"], q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Return half the sum of |p - q|: the share that would have to move to make them equal.

    0 for equal histograms, 1 for those that share no class. Few samples make it too large: two
    sets of n items from one distribution over k classes lie about sqrt(k / (pi n)) apart, and
    one set and the distribution itself about sqrt(k / (2 pi n)).
    """
    return 0.5 * (p - q).abs().sum(dim=-1)
