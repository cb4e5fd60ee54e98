"""Denoisers whose answers are known in closed form: their data are Gaussian."""

from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor, nn

from twostep.diffusion import Schedule, VariancePreserving
from twostep.distill.recipe import Stage
from twostep.models.bundle import Bundle
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.model import random_bundle

SCHEDULE = VariancePreserving.scaled_linear()


class Gaussian(nn.Module):
    """The exact eps of data from N(mean, deviation^2), value by value.

    A pooled embedding that is not 0 shifts the mean by its first value.
    """

    spec = BackboneSpec(family="gaussian", in_channels=1, out_channels=1, latent_ndim=1)

    def __init__(self, mean: float, deviation: float, schedule: Schedule) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))
        self.schedule = schedule

    def score(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        """Return the score of the density at time t, the derivative of its logarithm."""
        alpha, sigma = self.schedule.coefficients(t, x)
        variance = alpha**2 * self.deviation**2 + sigma**2
        return -(x - alpha * (self.mean + shift)) / variance

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        t = time + 1
        _, sigma = self.schedule.coefficients(t, x)
        return -sigma * self.score(x, t, conditioning.pooled[:, :1])


def gaussian(mean: float, deviation: float) -> Denoiser:
    """Return the exact denoiser of Gaussian data."""
    network = Gaussian(mean, deviation, SCHEDULE).requires_grad_(False)
    return Denoiser(network, SCHEDULE)


def nothing(count: int, shift: float = 0.0) -> Conditioning:
    """Return conditioning that says nothing, or that shifts the mean."""
    return Conditioning(
        torch.zeros(count, 1, 0), torch.full((count, 1), shift), torch.zeros(count, 6)
    )


@dataclass
class Draws:
    """A source of items of N(mean, deviation^2), `width` values each, without prompts."""

    mean: float
    deviation: float
    width: int = 4

    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        noise = torch.randn(count, self.width, generator=tensors)
        return self.mean + self.deviation * noise, nothing(count)

    def empty(self, like: Conditioning) -> Conditioning:
        return nothing(len(like))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Consistent(nn.Module):
    """The exact map of the flow to data of N(mean, deviation^2), with both to be learnt.

    It says x0; its start and its end are where `mean` and `deviation` say.
    """

    spec = BackboneSpec(family="consistent", in_channels=1, out_channels=1, latent_ndim=1)

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        alpha, sigma = SCHEDULE.coefficients(time + 1, x)
        spread = (alpha**2 * self.deviation**2 + sigma**2).sqrt()
        return self.mean + self.deviation * (x - alpha * self.mean) / spread


class Affine(nn.Module):
    """A generator: mean + deviation x, whatever the time, with both to be learnt."""

    spec = BackboneSpec(family="affine", in_channels=1, out_channels=1, latent_ndim=1)

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.deviation = nn.Parameter(torch.tensor(deviation))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.mean + self.deviation * x


def says_x0(network: nn.Module) -> Denoiser:
    """Return a denoiser whose network says x0."""
    return Denoiser(network, SCHEDULE, prediction_type="x0")


def make_stage(method: dict[str, object], **changes: object) -> Stage:
    """Return a short stage without warm-up, in float32."""
    values = {
        "student_steps": 4,
        "method": method,
        "iterations": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_iterations": 0,
        "precision": "fp32",
        "checkpoint_every": 10,
        "log_every": 1,
        "ema_decay": 0.5,
    }
    return Stage.model_validate(values | changes)


@pytest.fixture
def bundle() -> Bundle:
    return random_bundle()
