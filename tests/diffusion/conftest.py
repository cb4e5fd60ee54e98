"""What the tests of the flow share: SDXL's schedule and reproducible tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from twostep.diffusion import VariancePreserving


@pytest.fixture(scope="session")
def schedule() -> VariancePreserving:
    return VariancePreserving.scaled_linear()


@pytest.fixture
def randn() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw
