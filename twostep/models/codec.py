"""Media <-> latents. A codec is all that a denoiser's owner needs to know of pixels."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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

        def encode(vae: AutoencoderKL | AutoencoderTiny) -> Tensor:
            encoded = vae.encode(media.to(vae.dtype))
            latents: Tensor = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mean
            return latents

        return (self._in_range(encode).to(media.dtype) * float(self.vae.config.scaling_factor)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures, cut off at -1 and 1."""

        def decode(vae: AutoencoderKL | AutoencoderTiny) -> Tensor:
            pictures: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
            return pictures

        return self._in_range(decode).to(latents.dtype).clamp(-1, 1).contiguous()

    @torch.no_grad()
    def preview(self, latents: Latents) -> Float[Tensor, "batch 3 h w"]:
        """Return what latents roughly show, a pixel each in -1..1: a linear guess, thousands of times cheaper."""
        weights, offset = (values.to(latents) for values in self._linear)
        return (torch.einsum("bchw,cr->brhw", latents, weights) + offset[:, None, None]).clamp(-1, 1)

    @cached_property
    def _linear(self) -> tuple[Float[Tensor, "c 3"], Float[Tensor, " 3"]]:
        """The least-squares fit of pixels to latents, from what the decoder makes of fixed latents; made once."""
        generator = torch.Generator().manual_seed(0)
        channels, side = int(self.vae.config.latent_channels), 16
        coarse = torch.randn(8, channels, 4, 4, generator=generator)  # patches of one colour, as in pictures
        latents = torch.nn.functional.interpolate(coarse, (side, side)).to(self.vae.device)
        shown = torch.nn.functional.avg_pool2d(self.decode(latents), self.pixels_per_latent)
        columns = latents.movedim(1, -1).reshape(-1, channels)
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1)
        fit = torch.linalg.lstsq(columns.double().cpu(), shown.movedim(1, -1).reshape(-1, 3).double().cpu()).solution
        return fit[:-1], fit[-1]

    def _in_range(self, work: Callable[[AutoencoderKL | AutoencoderTiny], Tensor]) -> Tensor:
        """Do it once more in float32, on a copy, where half precision overflowed, as it does with SDXL's own VAE."""
        result = work(self.vae)
        if self.vae.dtype == torch.float16 and not bool(result.isfinite().all()):
            result = work(copy.deepcopy(self.vae).float())
        return result


def to_images(pictures: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Turn pictures in -1..1 into 8-bit images."""
    levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]
