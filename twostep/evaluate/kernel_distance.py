"""How far two sets of pictures lie apart, without assuming any shape: the kernel distance.

It is the unbiased estimate of the squared maximum mean discrepancy with the cubic kernel
k(x, y) = (x . y / features + 1)^3, which arXiv 1801.01401 calls KID in Inception's features (eq 3
and section 4). Unlike the Frechet distance it is not biased by the number of samples, and it can be
taken of fewer samples than features. This file does not know where features come from.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twostep.errors import TwostepError


class KernelDistanceError(TwostepError):
    """Features between which there is no kernel distance."""


def kernel_distance(
    a: Float[Tensor, "samples features"],
    b: Float[Tensor, "others other_features"],
    *,
    paired: bool = False,
) -> float:
    """Return the squared kernel distance between two sets of features.

    0 on average where both come from one distribution, and then negative as often as positive.

    Args:
        a: one set, of at least two samples.
        b: the other.
        paired: whether the i-th samples of both show the same prompt. They are more alike than
            others, so they are not compared with each other, as a sample is not with itself
            (the estimate of lemma 6 of Gretton et al., JMLR 13, 2012).

    Raises:
        KernelDistanceError: there are fewer samples, features of different sizes, or sets of
            different sizes that are said to be paired.
    """
    within_a, within_b, between = _kernels(a, b)
    _check_paired(between, paired)
    means = (_off_diagonal_row_means(within_a), _off_diagonal_row_means(within_b))
    across = _off_diagonal_row_means(between) if paired else between.mean(dim=1)
    return float(means[0].mean() + means[1].mean() - 2 * across.mean())


def kernel_influences(
    a: Float[Tensor, "samples features"],
    b: Float[Tensor, "others other_features"],
    *,
    paired: bool = False,
) -> tuple[Float64[Tensor, " samples"], Float64[Tensor, " others"]]:
    """Return how each sample moves the kernel distance, one tensor for each set.

    To first order, the distance of weighted sets is the distance plus the weighted means of these
    (the first term of Hoeffding's decomposition). Each has mean 0. Arguments and errors are those
    of `kernel_distance`.
    """
    within_a, within_b, between = _kernels(a, b)
    _check_paired(between, paired)
    if paired:
        from_a = _off_diagonal_row_means(between)
        from_b = _off_diagonal_row_means(between.T)
    else:
        from_a = between.mean(dim=1)
        from_b = between.mean(dim=0)
    of_a = 2 * (_off_diagonal_row_means(within_a) - from_a)
    of_b = 2 * (_off_diagonal_row_means(within_b) - from_b)
    return of_a - of_a.mean(), of_b - of_b.mean()


def _check_paired(between: Tensor, paired: bool) -> None:
    """Raise KernelDistanceError if sets are said to be paired and are not."""
    if paired and between.shape[0] != between.shape[1]:
        raise KernelDistanceError(
            f"sets of {between.shape[0]} and {between.shape[1]} samples are not paired."
        )


def _kernels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel within a, within b and between them."""
    if a.ndim != 2 or b.ndim != 2 or min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise KernelDistanceError(
            "a kernel distance needs two sets of at least 2 samples with as many features; "
            f"got {list(a.shape)} and {list(b.shape)}."
        )
    # In double precision, for the distance is a small difference of large sums.
    x = a.detach().to("cpu", torch.float64)
    y = b.detach().to("cpu", torch.float64)
    num_features = x.shape[1]
    within_a = (x @ x.T / num_features + 1) ** 3
    within_b = (y @ y.T / num_features + 1) ** 3
    between = (x @ y.T / num_features + 1) ** 3
    return within_a, within_b, between


def _off_diagonal_row_means(kernel: Tensor) -> Tensor:
    """Return the mean of every row without what stands on the diagonal."""
    means: Tensor = (kernel.sum(dim=1) - kernel.diagonal()) / (len(kernel) - 1)
    return means
