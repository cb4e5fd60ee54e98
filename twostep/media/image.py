"""Media <-> latents. A codec is all that a denoiser's owner needs to know of pixels."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from twostep.diffusion.shapes import Latents


@dataclass(frozen=True, eq=False)
class ImageCodec:
    """An SDXL-type autoencoder: pictures [batch, 3, height, width] in -1..1 <-> latents of about
    unit variance.
    """

    vae: AutoencoderKL | AutoencoderTiny

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels wide and high one latent is."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def encode(self, media: Float[Tensor, "batch 3 height width"]) -> Latents:
        """Return the scaled latents; of a variational autoencoder, the mean of the posterior."""
        latents = self._in_range(lambda vae: _latents(vae.encode(media.to(vae.dtype))))
        return (latents.to(media.dtype) * float(self.vae.config.scaling_factor)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures, cut off at -1 and 1."""
        scaled = latents / self.vae.config.scaling_factor
        pictures = self._in_range(lambda vae: vae.decode(scaled.to(vae.dtype)).sample)
        return pictures.to(latents.dtype).clamp(-1, 1).contiguous()

    @torch.no_grad()
    def preview(self, latents: Latents) -> Float[Tensor, "batch 3 h w"]:
        """Return what latents roughly show, a pixel each in -1..1: a linear guess that costs next
        to nothing.
        """
        with_one = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        return torch.einsum("bchw,cr->brhw", with_one, self._linear.to(latents)).clamp(-1, 1)

    @cached_property
    def _linear(self) -> Float[Tensor, "channels_plus_one 3"]:
        """The least-squares fit of colours to latents, of fixed smooth pictures; made once."""
        side = self.pixels_per_latent
        colours = 2 * torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
        pictures = interpolate(colours, scale_factor=4 * side, mode="bilinear")
        latents = self.encode(pictures.to(self.vae.device)).float().cpu()
        with_one = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        columns, wanted = (
            values.movedim(1, -1).flatten(0, 2) for values in (with_one, avg_pool2d(pictures, side))
        )
        fit: Tensor = torch.linalg.lstsq(columns, wanted).solution
        return fit

    def _in_range(self, work: Callable[[Any], Tensor]) -> Tensor:
        """Do it once more in float32, on a copy, where half precision overflowed, as it does in
        SDXL's own VAE.
        """
        result = work(self.vae)
        if self.vae.dtype == torch.float16 and not bool(result.isfinite().all()):
            result = work(copy.deepcopy(self.vae).float())
        return result


def _latents(encoded: Any) -> Any:
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean


def to_images(pictures: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Turn pictures in -1..1 into 8-bit images."""
    levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in levels]
