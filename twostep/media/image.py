"""The codec of pictures: an SDXL-type autoencoder."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from twostep.diffusion.shapes import Latents
from twostep.media.codec import FULL, Encoded, TinyDecoder
from twostep.media.eight_bits import eight_bits, images
from twostep.media.png import png_file

_LARGEST_PREVIEW = 512
"""Pixels of the longer side of a preview; larger ones are halved until they fit."""

Levels = UInt8[Tensor, "*batch 3 height width"]


@dataclass(frozen=True, eq=False)
class ImageCodec:
    """Pictures [batch, 3, height, width] in -1..1 <-> latents of about unit variance.

    Autoencoders say themselves by what their latents are scaled, some with a mean and a deviation
    for each channel.

    Args:
        vae: The autoencoder, of diffusers or, where it only draws, one of `networks.lean`; it
            computes in the precision of its own weights.
        deviation: What scaled latents are divided by: their standard deviation in EDM's models, 1
            in all others.
        tiny: A smaller decoder of the same latents, which then makes the previews.
        decoder: What makes the pictures: `FULL`, or else the name of the tiny decoder.
    """

    vae: Any
    deviation: float = 1.0
    tiny: TinyDecoder | None = None
    decoder: str = FULL

    @property
    def media(self) -> str:
        """The medium, as contracts name it."""
        return "image"

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along each side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of the latents of a picture of this size in pixels."""
        side = self.pixels_per_latent
        return int(self.vae.config.latent_channels), height // side, width // side

    @torch.no_grad()
    def encode(self, media: Float[Tensor, "batch 3 height width"]) -> Latents:
        """Return the scaled latents; of a variational autoencoder, the mean of the posterior."""
        latents = self._without_overflow(lambda vae: _latents(vae.encode(media.to(_dtype(vae)))))
        mean, scale = self.mean_and_factor(media)
        return ((latents.to(media.dtype) - mean) * scale).contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures, cut off at -1 and 1."""
        return self.decode_with_gradient(latents).clamp(-1, 1).contiguous()

    def decode_with_gradient(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures through which a loss reaches the latents.

        They are not cut off at -1 and 1, where no gradient would come back.
        """
        if self.decoder != FULL:
            return self.decode_tiny(latents)
        return self._without_overflow(lambda vae: self._decode_full(vae, latents))

    def decode_in_one_go(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return what `decode` does, as operations alone, for what traces or captures them.

        Half precision may have overflowed: nobody has looked.
        """
        tiny = self.decoder != FULL
        pictures = self.decode_tiny(latents) if tiny else self._decode_full(self.vae, latents)
        return pictures.clamp(-1, 1).contiguous()

    def _decode_full(self, vae: Any, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures by the autoencoder's own decoder; they are not cut off."""
        pictures: Tensor = vae.decode(self._unscaled(latents).to(_dtype(vae))).sample
        return pictures.to(latents.dtype)

    def decode_tiny(self, latents: Latents) -> Float[Tensor, "batch 3 height width"]:
        """Return pictures by the tiny decoder, which there must be; they are not cut off."""
        assert self.tiny is not None
        inputs = self.tiny_inputs(latents) / self.tiny.scaling_factor
        dtype = next(self.tiny.network.parameters()).dtype
        pictures: Tensor = self.tiny.network(inputs.to(dtype))
        return pictures.to(latents.dtype)

    def tiny_inputs(self, latents: Latents) -> Latents:
        """Return latents as tiny decoders take them: z times the autoencoder's scaling factor."""
        return self._unscaled(latents) * float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def preview(self, latents: Latents) -> Float[Tensor, "batch 3 rows columns"]:
        """Return what latents roughly show, in -1..1.

        With a tiny decoder its pictures, of at most 512 pixels. Without, one pixel for each latent
        by a linear map to colours, which costs next to nothing.
        """
        if self.tiny is not None:
            pictures = self.decode_tiny(latents).clamp(-1, 1)
            while max(pictures.shape[-2:]) > _LARGEST_PREVIEW:
                pictures = avg_pool2d(pictures, 2)
            return pictures
        with_one = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        return torch.einsum("bchw,cr->brhw", with_one, self._linear.to(latents)).clamp(-1, 1)

    def items(self, media: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
        """Return pictures in -1..1 as 8-bit images."""
        return to_images(media)

    def file(self, item: Image.Image, metadata: Mapping[str, str]) -> Encoded:
        """Return an image as a PNG with the metadata as text chunks."""
        return png_file(item, metadata)

    @property
    def scaling_numbers(self) -> tuple[Any, ...]:
        """All numbers that lie between latents and what the decoder reads."""
        config = self.vae.config
        return (
            float(config.scaling_factor),
            config.get("latents_mean"),
            config.get("latents_std"),
            self.deviation,
            None if self.decoder == FULL or self.tiny is None else self.tiny.scaling_factor,
        )

    def mean_and_factor(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return mean and factor m and f: latents are f (z - m) of the autoencoder's own z."""
        config = self.vae.config
        factor = float(config.scaling_factor) / self.deviation
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return 0.0, factor
        shaped = [torch.tensor(each, dtype=torch.float32).view(1, -1, 1, 1) for each in (mean, std)]
        mean, std = (each.to(like.dtype).to(like.device) for each in shaped)
        return mean, factor / std

    def _unscaled(self, latents: Latents) -> Latents:
        """Return the autoencoder's own z of latents."""
        mean, scale = self.mean_and_factor(latents)
        return latents / scale + mean

    @cached_property
    def _linear(self) -> Float[Tensor, "channels_plus_one 3"]:
        """The least-squares fit of colours to latents, on fixed smooth pictures; made once."""
        side = self.pixels_per_latent
        pictures = self.smooth_pictures()
        latents = self.encode(pictures.to(self.vae.device)).float().cpu()
        with_one = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        inputs = with_one.movedim(1, -1).flatten(0, 2)
        targets = avg_pool2d(pictures, side).movedim(1, -1).flatten(0, 2)
        fit: Tensor = torch.linalg.lstsq(inputs, targets).solution
        return fit

    def smooth_pictures(self) -> Float[Tensor, "4 3 height width"]:
        """Return four fixed pictures of soft colours, of 16 latents a side, on the CPU."""
        colours = 2 * torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
        return interpolate(colours, scale_factor=4 * self.pixels_per_latent, mode="bilinear")

    def _without_overflow(self, compute: Callable[[Any], Tensor]) -> Tensor:
        """Compute again in float32, on a copy, where half precision overflowed.

        SDXL's own autoencoder does.
        """
        result = compute(self.vae)
        if _dtype(self.vae) == torch.float16 and not bool(result.isfinite().all()):
            result = compute(copy.deepcopy(self.vae).float())
        return result


def _dtype(vae: Any) -> torch.dtype:
    """Return the precision of an autoencoder; diffusers' own property walks through all of it."""
    dtype: torch.dtype = next(vae.parameters()).dtype
    return dtype


def _latents(encoded: Any) -> Any:
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean


def to_images(pictures: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Turn pictures in -1..1 into 8-bit images."""
    if pictures.device.type == "cpu":
        # PyTorch rounds a small picture with all of its threads, and wakes them for it: that takes
        # longer than the rounding, and from an engine with threads of its own a core.
        return images(eight_bits(pictures.float().numpy()))
    return images(to_levels(pictures).cpu().numpy())


def to_levels(pictures: Float[Tensor, "*batch 3 height width"]) -> Levels:
    """Return pictures in -1..1 in levels of 0..255, as PNGs hold them; the rest is cut off."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_levels(levels: Levels) -> Float[Tensor, "*batch 3 height width"]:
    """Return levels of 0..255 as pictures in -1..1."""
    return levels.float() / 127.5 - 1
