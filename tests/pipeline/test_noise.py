"""Noise by numpy is PyTorch's, to the last bit."""

import platform

import numpy as np
import pytest
import torch

from twostep.pipeline.noise import torch_noise


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="other processors round otherwise"
)
@pytest.mark.parametrize("count", [16, 17, 31, 256, 1025, 65536])
def test_noise_is_pytorchs_to_the_last_bit(count: int) -> None:
    for seed in (0, 1, 7, 12345, 2**31, 2**32 - 1):
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = torch.randn(count, generator=generator).numpy()
        assert np.array_equal(torch_noise(seed, count).view(np.uint32), expected.view(np.uint32))


def test_noise_is_standard_normal() -> None:
    noise = torch_noise(3, 100_000)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
