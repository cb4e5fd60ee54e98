"""The nano teacher: eps prediction on cached latents, weighted by min-SNR (arXiv 2303.09556).

Here, unlike in distillation, the top time keeps its grain of signal (x_T = alpha_T x0 + sigma_T
eps): a network that predicts eps can only learn x0 there from it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twostep.diffusion import VariancePreserving
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.pretrain.descent import DescentSettings, silent, train
from twostep.pretrain.latents import LatentCache
from twostep.pretrain.model import PIXELS, build_unet
from twostep.text.clip import TextEncoders
from twostep.training.loop import OnIteration, Randomness
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder


class TeacherSettings(Settings):
    """The recipe part of the teacher."""

    loop: DescentSettings
    autoencoder: Path = Field(Path("runs/nano-vae/model"), description="folder that holds `vae`")
    text_encoders: Path = Field(
        Path("runs/nano-text/model"), description="folder that holds the text encoders"
    )
    variants: int = Field(
        96, gt=0, description="composites of every drawing in the cache of latents"
    )
    snr_limit: float = Field(
        5.0, gt=0, description="gamma of the min-SNR weight, min(snr, gamma) / snr"
    )
    guidance: float = Field(3.0, ge=1, description="guidance scale that the teacher recommends")


class TuneSettings(Settings):
    """The recipe part of a teacher that is tuned to other drawings."""

    loop: DescentSettings
    model: str = Field("nano", description="the teacher to start from")
    name: str = Field(description="what the tuned teacher is called")
    variants: int = Field(
        96, gt=0, description="composites of every drawing in the cache of latents"
    )
    snr_limit: float = Field(
        5.0, gt=0, description="gamma of the min-SNR weight, min(snr, gamma) / snr"
    )


def noise_loss(
    denoiser: Denoiser,
    x0: Float[Tensor, "batch c h w"],
    conditioning: Conditioning,
    generator: torch.Generator,
    *,
    snr_limit: float,
) -> Float[Tensor, ""]:
    """Noise latents to random times and return the squared error of eps, weighted by min-SNR."""
    t = torch.randint(1, denoiser.schedule.num_times + 1, (len(x0),), generator=generator)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    alpha, sigma = denoiser.schedule.coefficients(t, x0)
    predicted = denoiser(alpha * x0 + sigma * eps, t, conditioning)
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(max=snr_limit) / snr
    loss: Tensor = (weight * (predicted.eps - eps) ** 2).mean()
    return loss


def train_teacher(
    latents: LatentCache,
    text: TextEncoders,
    settings: TeacherSettings | TuneSettings,
    folder: RunFolder,
    *,
    start: Denoiser | None = None,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int, Denoiser], None] = lambda iteration, denoiser: None,
) -> Denoiser:
    """Train a UNet, a fresh one or that of `start`, to predict the noise on captioned latents,
    where it is.

    Returns it with averaged weights.
    """
    torch.manual_seed(settings.loop.seed)
    denoiser = start or Denoiser(SdxlUnet(build_unet()), VariancePreserving.scaled_linear())
    denoiser.network.requires_grad_(True).train()

    def loss(iteration: int, draw: Randomness) -> Tensor:
        x0, captions = latents.draw(settings.loop.batch_size, draw.tensors, draw.words)
        with torch.no_grad():
            conditioning = text.conditioning(captions, PIXELS, PIXELS)
        x0 = x0.to(denoiser.device)
        return noise_loss(denoiser, x0, conditioning, draw.tensors, snr_limit=settings.snr_limit)

    train(
        denoiser.network,
        loss,
        settings.loop,
        folder,
        "teacher",
        on_iteration=on_iteration,
        on_checkpoint=lambda iteration: on_checkpoint(iteration, denoiser),
    )
    return denoiser
