"""A random nano teacher and a handful of random latents: real networks, seconds."""

import random

import pytest
import torch
from torch import Tensor

from twostep.models.bundle import Bundle
from twostep.models.nano import random_bundle


class Handful:
    """Sixteen latents of noise with two captions."""

    def draw(self, count: int, tensors: torch.Generator, words: random.Random) -> tuple[Tensor, list[str]]:
        latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        rows = torch.randint(16, (count,), generator=tensors)
        return latents[rows], [words.choice(("a red fox", "")) for _ in range(count)]


@pytest.fixture
def source() -> Handful:
    return Handful()


@pytest.fixture
def teacher() -> Bundle:
    return random_bundle()
