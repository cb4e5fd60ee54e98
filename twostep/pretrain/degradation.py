"""Mild damage, as a small autoencoder or a half-trained denoiser does it: blur, noise, contrast,
brightness.

The judge learns on pictures damaged like this, so that it judges what is drawn and not how cleanly.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from twostep.training.recipe import Settings


class Degradation(Settings):
    """How strong the damage may become; each kind is drawn anew for every picture."""

    probability: float = Field(
        0.6, ge=0, le=1, description="share of pictures that get blur; noise; other colours"
    )
    largest_blur_pixels: float = Field(
        1.2, ge=0, le=3, description="largest standard deviation of the Gaussian blur"
    )
    largest_noise: float = Field(
        0.15, ge=0, le=1, description="largest standard deviation of the noise, in -1..1"
    )
    largest_contrast_change: float = Field(
        0.2, ge=0, lt=1, description="contrast is multiplied by 1 +- up to this"
    )
    largest_brightness_shift: float = Field(
        0.1, ge=0, le=1, description="each colour channel is shifted by +- this"
    )


def degrade(
    images: Float[Tensor, "batch 3 height width"],
    degradation: Degradation,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, " batch"]]:
    """Damage pictures in -1..1 at random.

    Returns:
        The pictures, still within -1..1, and the blur that each got, in pixels.
    """
    count = len(images)
    happens = (torch.rand(3, count, generator=generator) < degradation.probability).float()
    strength = torch.rand(2, count, generator=generator) * happens[:2]
    blur_pixels = strength[0] * degradation.largest_blur_pixels
    noise = strength[1] * degradation.largest_noise
    signs = (2 * torch.rand(4, count, generator=generator) - 1) * happens[2]
    contrast = 1 + signs[0] * degradation.largest_contrast_change
    shift = signs[1:].T * degradation.largest_brightness_shift
    damaged = blur(images, blur_pixels) * contrast[:, None, None, None] + shift[:, :, None, None]
    damaged = damaged + noise[:, None, None, None] * _noise_like(images, generator)
    return damaged.clamp(-1, 1), blur_pixels


def blur(
    images: Float[Tensor, "batch channels height width"], blur_pixels: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Blur every picture with its own Gaussian of this standard deviation; 0 leaves it as it is."""
    count, channels, height, width = images.shape
    reach = int(3 * float(blur_pixels.max())) + 1
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype)
    # A standard deviation of 0 becomes one so small that only the middle weight is left.
    weights = torch.exp(-0.5 * (offsets / blur_pixels.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (weights / weights.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    # All planes of all pictures are channels of one, so that each can have its own kernel.
    planes = functional.pad(images.reshape(1, -1, height, width), (reach,) * 4, mode="replicate")
    planes = functional.conv2d(planes, kernels[:, None, :, None], groups=len(kernels))
    planes = functional.conv2d(planes, kernels[:, None, None, :], groups=len(kernels))
    return planes.reshape(count, channels, height, width)


def _noise_like(
    images: Float[Tensor, "batch 3 height width"], generator: torch.Generator
) -> Float[Tensor, "batch 3 height width"]:
    """Return noise of about unit variance: fine, of single pixels, and soft spots of four."""
    count, channels, height, width = images.shape
    fine = torch.randn(images.shape, generator=generator)
    coarse = torch.randn(count, channels, height // 4, width // 4, generator=generator)
    spots = functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
    # Interpolation takes variance away from the spots; 1.5 puts it back.
    noise: Tensor = (fine + spots * 1.5) * 0.5**0.5
    return noise
