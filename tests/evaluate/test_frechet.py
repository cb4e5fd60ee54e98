"""The Frechet distance against its closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch

from twostep.evaluate.frechet import (
    FeatureStatistics,
    FrechetError,
    fit_features,
    frechet_distance,
    frechet_influences,
)


def random_statistics(seed: int, size: int = 6) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    return FeatureStatistics(mean, factor @ factor.T, 100)


def test_a_set_is_at_distance_zero_from_itself():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(fit_features(features), fit_features(features)) == pytest.approx(
        0, abs=1e-9
    )


def test_a_shift_counts_as_its_square():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()
    distance = frechet_distance(fit_features(features), fit_features(features + 2))
    assert distance == pytest.approx(8 * 4, rel=1e-9)


def test_a_scaling_of_diagonal_gaussians_has_a_closed_form():
    """For commuting covariances d^2 = |m1 - m2|^2 + sum (s1 - s2)^2."""
    a = FeatureStatistics(
        torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), 10
    )
    b = FeatureStatistics(
        torch.ones(3).double(), torch.diag(torch.tensor([4.0, 4.0, 25.0])).double(), 10
    )
    assert frechet_distance(a, b) == pytest.approx(3 + 1 + 0 + 4)


def test_it_agrees_with_the_matrix_root_of_scipy():
    a, b = random_statistics(1), random_statistics(2)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = (
        (a.mean - b.mean).square().sum()
        + a.covariance.trace()
        + b.covariance.trace()
        - 2 * np.trace(root).real
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected))
    assert frechet_distance(b, a) == pytest.approx(float(expected))


def test_fewer_samples_than_features_are_no_special_case():
    generator = torch.Generator().manual_seed(3)
    few, other = torch.randn(5, 64, generator=generator), torch.randn(5, 64, generator=generator)
    assert frechet_distance(fit_features(few), fit_features(few)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(fit_features(few), fit_features(other)) > 1


def test_statistics_are_those_of_numpy():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    fitted = fit_features(features)
    assert fitted.num_samples == 30
    np.testing.assert_allclose(
        fitted.covariance.numpy(), np.cov(features.double().numpy().T), rtol=1e-10
    )


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(0, 4)])
def test_fewer_than_two_samples_are_refused(features: torch.Tensor):
    with pytest.raises(FrechetError, match="at least 2 samples"):
        fit_features(features)


def test_nan_is_refused():
    with pytest.raises(FrechetError, match="NaN"):
        fit_features(torch.full((4, 3), float("nan")))


def test_features_of_different_judges_are_refused():
    with pytest.raises(FrechetError, match="same judge"):
        frechet_distance(random_statistics(1, 4), random_statistics(1, 5))


def test_influences_are_the_derivative_by_the_samples_weights():
    """Against a finite difference: one sample weighs a little more."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(60, 5, generator=generator).double() @ torch.diag(torch.arange(1.0, 6)).double()
    b = 0.5 + torch.randn(80, 5, generator=generator).double()
    of_a, of_b = frechet_influences(a, b)
    assert of_a.mean().abs() < 1e-9
    assert of_b.mean().abs() < 1e-9
    for features, other, influences in ((a, b, of_a), (b, a, of_b)):
        step = 1e-5
        distances = []
        for sign in (1, -1):
            weights = torch.full((len(features),), 1 / len(features), dtype=torch.float64)
            weights[3] += sign * step
            weights /= weights.sum()
            mean = weights @ features
            deviation = features - mean
            # The unbiased covariance, as fit_features takes it.
            bias = len(features) / (len(features) - 1)
            covariance = bias * (deviation.T * weights) @ deviation
            weighted = FeatureStatistics(mean, covariance, len(features))
            distances.append(frechet_distance(weighted, fit_features(other)))
        slope = (distances[0] - distances[1]) / (2 * step)
        # The influence divides by n where the unbiased covariance divides by n - 1.
        assert slope == pytest.approx(float(influences[3]), rel=0.05, abs=0.05)


def test_influences_of_few_samples_are_finite():
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(6, 20, generator=generator)
    b = torch.randn(9, 20, generator=generator)
    of_a, of_b = frechet_influences(a, b)
    assert torch.isfinite(of_a).all()
    assert torch.isfinite(of_b).all()
