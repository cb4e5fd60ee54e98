"""What the tests of the flow share: schedules, reproducible tensors, and the exact denoiser."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twostep.diffusion import Denoise, Prediction, Schedule, VariancePreserving


@pytest.fixture(scope="session")
def schedule() -> VariancePreserving:
    return VariancePreserving.scaled_linear()


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw


@pytest.fixture(scope="session")
def gaussian() -> Callable[[float, float, Schedule], Denoise]:
    """Make the exact denoiser of data drawn from N(mean, deviation^2), E[x0 | x_t] and E[eps | x_t]."""

    def make(mean: float, deviation: float, schedule: Schedule) -> Denoise:
        def denoise(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = schedule.coefficients(t, x)
            score = (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
            return Prediction(x0=mean + alpha * deviation**2 * score, eps=sigma * score)

        return denoise

    return make
