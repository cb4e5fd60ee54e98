"""A random nano teacher and a handful of random latents: real networks, seconds."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twostep.models.bundle import Bundle
from twostep.models.saving import save_bundle
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.model import random_bundle
from twostep.text.clip import TextEncoders


class Handful:
    """Sixteen latents of noise with two captions."""

    def __init__(self, text: TextEncoders) -> None:
        self.text = text

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        rows = torch.randint(16, (count,), generator=tensors)
        captions = [words.choice(("a red fox", "")) for _ in range(count)]
        return latents[rows], self.text.conditioning(captions, 64, 64)

    def empty(self, like: Conditioning) -> Conditioning:
        return self.text.conditioning([""], 64, 64).expand(len(like))


@pytest.fixture
def source(teacher: Bundle) -> Handful:
    return Handful(teacher.text)


@pytest.fixture
def teacher() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher with random weights that draws in few steps."""
    folder, teacher = tmp_path_factory.mktemp("model"), random_bundle()
    save_bundle(replace(teacher, contract=replace(teacher.contract, steps=2)), folder)
    return folder
