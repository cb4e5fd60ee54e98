"""How far two sets of pictures lie apart as distributions: the Frechet distance between Gaussians
fitted to features.

d^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), eq 6 of arXiv 1706.08500. The trace of the root
is the sum of the singular values of C1^(1/2) C2^(1/2): no complex numbers, no iteration, and
covariances without full rank (fewer samples than features) are no special case. Few samples bias
the distance upwards, so compare only distances that were taken with the same number of samples.
This file does not know where features come from.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twostep.errors import TwostepError

_RANK_TOLERANCE = 1e-10
"""Eigenvalues below this share of the largest one are rounding."""


class FrechetError(TwostepError):
    """Features for which there is no Frechet distance."""


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """The Gaussian fitted to a set of features: all that the Frechet distance needs of it."""

    mean: Float64[Tensor, " features"]
    covariance: Float64[Tensor, "features features"]
    num_samples: int


def fit_features(features: Float[Tensor, "samples features"]) -> FeatureStatistics:
    """Return mean and unbiased covariance in float64.

    Raises FrechetError for fewer than two samples, or for values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise FrechetError(
            "a covariance needs features [samples, features] of at least 2 samples; "
            f"got {list(features.shape)}. Give more pictures."
        )
    if not bool(torch.isfinite(features).all()):
        raise FrechetError("the features hold NaN or infinity; look for broken pictures.")
    samples = features.detach().to("cpu", torch.float64)
    covariance = torch.atleast_2d(torch.cov(samples.T))
    return FeatureStatistics(samples.mean(dim=0), covariance, len(samples))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet distance between two Gaussians, eq 6 of arXiv 1706.08500.

    It is the number that FID reports, in the features given; 0 for identical Gaussians. Raises
    FrechetError if their features are of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        sizes = f"features of {len(a.mean)} and of {len(b.mean)} numbers"
        raise FrechetError(f"{sizes} cannot be compared; use the same judge for both.")
    roots = _symmetric_root(a.covariance) @ _symmetric_root(b.covariance)
    root_of_product = torch.linalg.matrix_norm(roots, "nuc")
    spread = a.covariance.trace() + b.covariance.trace() - 2 * root_of_product
    # Rounding can leave a hair below zero where the two sets are the same.
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet_influences(
    a: Float[Tensor, "samples features"], b: Float[Tensor, "others features"]
) -> tuple[Float64[Tensor, " samples"], Float64[Tensor, " others"]]:
    """Return how each sample moves the Frechet distance, one tensor for each set.

    To first order, the distance of weighted sets is the distance plus the weighted means of these;
    each has mean 0. With the optimal map T = C1^(-1/2) (C1^(1/2) C2 C1^(1/2))^(1/2) C1^(-1/2)
    between the Gaussians, the derivative by C1 is 1 - T, so a sample x of the first set moves the
    distance by 2 (m1 - m2) . (x - m1) + (x - m1) (1 - T) (x - m1), less the mean of that.

    Raises:
        FrechetError: as for `fit_features` and `frechet_distance`.
    """
    fitted_a = fit_features(a)
    fitted_b = fit_features(b)
    frechet_distance(fitted_a, fitted_b)
    return _influences(a, fitted_a, fitted_b), _influences(b, fitted_b, fitted_a)


def _influences(
    features: Tensor, fitted: FeatureStatistics, other: FeatureStatistics
) -> Float64[Tensor, " samples"]:
    """Return how each sample of a set moves its distance to another."""
    deviation = features.detach().to("cpu", torch.float64) - fitted.mean
    values, vectors = torch.linalg.eigh(fitted.covariance)
    # Samples have no part along directions in which they do not vary at all.
    varies = values > values[-1] * _RANK_TOLERANCE
    roots = values.clamp(min=0).sqrt()
    inverse_roots = torch.where(varies, 1 / roots, torch.zeros_like(roots))
    root = vectors * roots @ vectors.T
    middle = _symmetric_root(root @ other.covariance @ root)
    whitened = deviation @ (vectors * inverse_roots @ vectors.T)
    mapped = (whitened @ middle * whitened).sum(dim=1)
    moved = 2 * deviation @ (fitted.mean - other.mean) + deviation.square().sum(dim=1) - mapped
    influences: Tensor = moved - moved.mean()
    return influences


def _symmetric_root(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Return the positive root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding leaves eigenvalues of matrices without full rank slightly below zero.
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root
