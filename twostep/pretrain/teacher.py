"""The teacher of a built-in model: eps prediction on cached latents, weighted by min-SNR
(arXiv 2303.09556).

Here, unlike in distillation, the top time keeps its grain of signal (x_T = alpha_T x0 + sigma_T
eps): a network that predicts eps can learn x0 there from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from twostep.diffusion import VariancePreserving
from twostep.diffusion.shapes import Batch, sent
from twostep.models.bundle import PromptEncoder
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.pretrain.latents import CaptionedLatents, LatentCache
from twostep.pretrain.loop import Loss, PartSettings, silent, train_network
from twostep.pretrain.model import build_unet
from twostep.pretrain.sizes import ModelSize
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder


class DenoiserSettings(PartSettings):
    """What the recipes of a teacher and of a tuned one have in common."""

    snr_limit: float = Field(
        5.0, gt=0, description="gamma of the min-SNR weight, min(snr, gamma) / snr"
    )
    snr_floor: float = Field(
        0.0,
        ge=0,
        description="least snr in that weight, as in max(snr, 1) of arXiv 2202.00512; 0 for none",
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )


class TeacherSettings(DenoiserSettings):
    """The recipe of a teacher."""

    part: Literal["teacher"] = "teacher"
    variants: int = Field(96, gt=0, description="pictures of every drawing in the latent cache")
    autoencoder: Path = Field(Path("runs/nano-vae/model"), description="folder that holds `vae`")
    text_encoders: Path = Field(
        Path("runs/nano-text/model"), description="folder that holds the text encoders"
    )
    guidance: float = Field(3.0, ge=1, description="guidance scale that the teacher recommends")


class TuneSettings(DenoiserSettings):
    """The recipe of a teacher that is tuned to other drawings."""

    part: Literal["tune"] = "tune"
    variants: int = Field(96, gt=0, description="pictures of every drawing in the latent cache")
    model: str = Field("nano", description="the teacher to start from")
    name: str = Field(description="what the tuned teacher is called")


def noise_loss(
    denoiser: Denoiser,
    x0: Batch,
    conditioning: Conditioning,
    t: Int[Tensor, " batch"],
    eps: Batch,
    *,
    snr_limit: float,
    snr_floor: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the squared error of the predicted eps, weighted by clamp(snr, floor, limit) / snr.

    Args:
        denoiser: predicts.
        x0: clean latents.
        conditioning: of the same items.
        t: times, 1..1000.
        eps: noise of unit variance.
        snr_limit: gamma of arXiv 2303.09556.
        snr_floor: where noise outweighs the signal by more, errors in x0 count alike (the truncated
            weight of arXiv 2202.00512); 0 for none.
    """
    alpha, sigma = denoiser.schedule.coefficients(t, x0)
    predicted = denoiser(alpha * x0 + sigma * eps, t, conditioning)
    snr = (alpha / sigma) ** 2
    weight = snr.clamp(min=snr_floor, max=snr_limit) / snr
    loss: Tensor = (weight * (predicted.eps - eps) ** 2).mean()
    return loss


def noise_loss_on_latents(
    denoiser: Denoiser,
    latents: CaptionedLatents,
    text: PromptEncoder,
    *,
    batch_size: int,
    size: tuple[int, int],
    snr_limit: float,
    snr_floor: float = 0.0,
) -> Loss:
    """Return the loss of an iteration: `noise_loss` on a batch of captioned latents.

    Args:
        denoiser: predicts; whatever of it is trained is the caller's choice.
        latents: the batch is drawn from these, with captions.
        text: encodes the captions, without gradients.
        batch_size: of all processes together; each takes its share.
        size: (width, height) of the latents' pictures in pixels.
        snr_limit: as in `noise_loss`.
        snr_floor: likewise.
    """
    device = denoiser.device
    width, height = size
    top = int(denoiser.schedule.top)  # SDXL's times are integers

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        share = world().share(batch_size)
        x0, captions = latents.draw(batch_size, generator, randomness.words)
        t = torch.randint(1, top + 1, (batch_size,), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        with torch.no_grad():
            conditioning = text.conditioning(captions[share], width, height)
        return noise_loss(
            denoiser,
            sent(x0[share], device),
            conditioning,
            t=t[share],
            eps=sent(eps[share], device),
            snr_limit=snr_limit,
            snr_floor=snr_floor,
        )

    return loss


def new_denoiser(size: ModelSize, seed: int) -> Denoiser:
    """Return a UNet with random weights, which predicts eps on SDXL's schedule."""
    torch.manual_seed(seed)
    return Denoiser(SdxlUnet(build_unet(size)), VariancePreserving.scaled_linear())


def train_teacher(
    denoiser: Denoiser,
    latents: LatentCache,
    text: PromptEncoder,
    settings: TeacherSettings | TuneSettings,
    folder: RunFolder,
    *,
    pixels: int,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int, Denoiser], None] = lambda iteration, denoiser: None,
) -> Denoiser:
    """Train a UNet, where it is, to predict the noise on captioned latents.

    Args:
        denoiser: a fresh one, or that of a teacher to tune; trained in place.
        latents: what it learns from.
        text: frozen, on the same device.
        settings: the recipe.
        folder: the run's folder.
        pixels: side of the pictures whose latents these are.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint with the averaged weights in the denoiser.

    Returns:
        The same denoiser, with averaged weights.
    """
    torch.manual_seed(settings.loop.seed)
    denoiser.network.requires_grad_(True).train()
    denoiser.checkpoint_gradients(settings.gradient_checkpointing)
    loss = noise_loss_on_latents(
        denoiser,
        latents,
        text,
        batch_size=settings.loop.batch_size,
        size=(pixels, pixels),
        snr_limit=settings.snr_limit,
        snr_floor=settings.snr_floor,
    )
    train_network(
        denoiser.network,
        loss,
        settings.loop,
        folder,
        name="teacher",
        on_iteration=on_iteration,
        on_checkpoint=lambda iteration: on_checkpoint(iteration, denoiser),
    )
    return denoiser
