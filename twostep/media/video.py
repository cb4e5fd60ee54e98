"""The codec of clips: every frame by the autoencoder of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from twostep.media.clip import Clip, webp_file
from twostep.media.codec import CodecError, Encoded
from twostep.media.image import ImageCodec, to_images

_PIXELS_AT_ONCE = 2**20
"""Pixels that go through the autoencoder together: 256 frames of 64x64, one of 1024x1024."""

_PREVIEW_FRAMES = 8
_PREVIEW_PIXELS = 128

Videos = Float[Tensor, "batch 3 frames height width"]
Latents = Float[Tensor, "batch c frames h w"]


@dataclass(frozen=True, eq=False)
class VideoCodec:
    """Clips [batch, 3, frames, height, width] in -1..1 <-> latents [batch, c, frames, h, w].

    Args:
        image: The codec of the frames.
        length: Frames of a clip.
        longest: The most frames that the model draws.
        frames_per_second: Of what is written.
    """

    image: ImageCodec
    length: int = 16
    longest: int = 32
    frames_per_second: float = 8.0

    @property
    def media(self) -> str:
        """The medium, as contracts name it."""
        return "video"

    def with_length(self, length: int) -> VideoCodec:
        """Return the same for clips of so many frames; CodecError for more than there can be."""
        if not 1 <= length <= self.longest:
            raise CodecError(f"this model draws clips of 1 to {self.longest} frames, not {length}.")
        return replace(self, length=length)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (channels, frames, height, width) of the latents of a clip of this size."""
        channels, rows, columns = self.image.latent_shape(width, height)
        return channels, self.length, rows, columns

    def encode(self, media: Videos) -> Latents:
        """Return the scaled latents of clips."""
        return self._frame_by_frame(self.image.encode, media)

    def decode(self, latents: Latents) -> Videos:
        """Return clips, cut off at -1 and 1."""
        side = self.image.pixels_per_latent
        return self._frame_by_frame(self.image.decode, latents, scale=side * side)

    def preview(self, latents: Latents) -> Float[Tensor, "batch 3 rows columns"]:
        """Return at most eight frames of every clip beside each other, in -1..1.

        They are decoded, and halved until they are at most 128 pixels high and wide.
        """
        num_frames = latents.shape[2]
        count = min(num_frames, _PREVIEW_FRAMES)
        chosen = torch.linspace(0, num_frames - 1, count).round().long().to(latents.device)
        side = self.image.pixels_per_latent
        clips = self._frame_by_frame(self._small, latents[:, :, chosen], scale=side * side)
        return clips.permute(0, 1, 3, 2, 4).flatten(3)

    def _small(self, latents: Tensor) -> Tensor:
        """Return what frames show, in small."""
        frames = self.image.decode(latents)
        while max(frames.shape[-2:]) > _PREVIEW_PIXELS:
            frames = avg_pool2d(frames, 2)
        return frames

    def items(self, media: Videos) -> list[Clip]:
        """Return clips in -1..1 as 8-bit frames."""
        return [
            Clip(tuple(to_images(clip.transpose(0, 1))), self.frames_per_second) for clip in media
        ]

    def file(self, item: Clip, metadata: Mapping[str, str]) -> Encoded:
        """Return a clip as an animated WebP with the metadata in its EXIF."""
        return webp_file(item, metadata)

    def _frame_by_frame(
        self, compute: Callable[[Tensor], Tensor], clips: Tensor, *, scale: int = 1
    ) -> Tensor:
        """Map frames, a few at once; `scale` is how many pixels each place of them has."""
        num_frames = clips.shape[2]
        frames = clips.transpose(1, 2).flatten(0, 1)
        pixels = scale * frames.shape[-1] * frames.shape[-2]
        parts = frames.split(max(1, _PIXELS_AT_ONCE // pixels))
        mapped = torch.cat([compute(part) for part in parts])
        again: Tensor = mapped.unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous()
        return again
