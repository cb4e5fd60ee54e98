"""Media <-> latents. A codec is all that a denoiser's owner needs to know of pixels."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twostep.diffusion.shapes import Latents


@runtime_checkable
class Codec(Protocol):
    """Encodes media to scaled latents and decodes them again."""

    def encode(self, media: Tensor) -> Tensor:
        """Return the latents of media in -1..1."""

    def decode(self, latents: Tensor) -> Tensor:
        """Return the media in -1..1 of latents."""


@dataclass(frozen=True, eq=False)
class ImageCodec:
    """An SDXL-type autoencoder: pictures [batch, 3, height, width] in -1..1 <-> latents of about unit variance."""

    vae: AutoencoderKL | AutoencoderTiny

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide and high one latent is."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, media: Float[Tensor, "batch 3 height width"]) -> Latents:
        """Return the scaled latents; of a variational autoencoder, the mean of the posterior."""
        encoded = self.vae.encode(media)
        latents: Tensor = encoded.latents if isinstance(self.vae, AutoencoderTiny) else encoded.latent_dist.mean
        return (latents * float(self.vae.config.scaling_factor)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures, cut off at -1 and 1."""
        pictures: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return pictures.clamp(-1, 1).contiguous()


def to_images(pictures: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Turn pictures in -1..1 into 8-bit images."""
    levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]
