"""The codec of Stable Audio: waveforms of several channels and the latents of an autoencoder.

The autoencoder (`AutoencoderOobleck` of diffusers, section 2.1 of arXiv 2407.14358) works on
waveforms themselves, so nothing is found anew by Griffin-Lim, and both channels come from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.media.audio import (
    AudioError,
    Sound,
    picture_spectrogram,
    sound_file,
    spectrogram_pictures,
    turned_down,
)
from twostep.media.codec import Encoded

_PREVIEW_COLUMNS = 256
"""Of the spectrogram of a preview, whatever the sound lasts."""


@dataclass(frozen=True, eq=False)
class OobleckCodec:
    """Waveforms [batch, channels, samples] in -1..1 <-> latents [batch, components, time].

    A size is the number of samples by 1.

    Args:
        network: The autoencoder, an `AutoencoderOobleck`.
        longest: Columns of the longest latents that the model makes.
        format: The kind of file, one of `media.audio.FORMATS`.
    """

    network: Any
    longest: int
    format: str = "wav"

    @property
    def media(self) -> str:
        """The medium, as contracts name it."""
        return "audio"

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.network.config.sampling_rate)

    @property
    def hop(self) -> int:
        """Samples that one column of latents stands for."""
        return int(self.network.hop_length)

    @property
    def num_channels(self) -> int:
        """Channels of a sound: 2 is left and right."""
        return int(self.network.config.audio_channels)

    def latent_shape(self, width: int, height: int) -> tuple[int, int]:
        """Return (components, time) for so many samples by 1.

        Raises AudioError for a length that is no whole number of columns, or too long.
        """
        columns, rest = divmod(width, self.hop)
        if height != 1 or not 1 <= columns <= self.longest or rest:
            longest = self.longest * self.hop
            raise AudioError(
                f"a sound of {width}x{height} ({width / self.rate:.2f} s) cannot be made: its "
                f"length in samples is a multiple of {self.hop} up to {longest}, by 1, which is "
                f"{longest / self.rate:.2f} s at {self.rate} Hz."
            )
        return int(self.network.config.decoder_input_channels), columns

    @torch.no_grad()
    def encode(
        self, media: Float[Tensor, "batch channels samples"]
    ) -> Float[Tensor, "batch components time"]:
        """Return latents of waveforms, the means of what the autoencoder says of them.

        Raises AudioError for other channels than the model's, and lengths as `latent_shape`.
        """
        if media.shape[1] != self.num_channels:
            raise AudioError(
                f"the sounds have {media.shape[1]} channels; the model has {self.num_channels}. "
                "Repeat a channel for both sides, or take the mean of several."
            )
        self.latent_shape(media.shape[2], 1)
        latents: Tensor = self.network.encode(media.to(self.network.dtype)).latent_dist.mode()
        return latents.to(media.dtype)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch components time"]
    ) -> Float[Tensor, "batch channels samples"]:
        """Return waveforms, turned down where they would reach beyond -1 and 1."""
        sounds: Tensor = self.network.decode(latents.to(self.network.dtype)).sample.float()
        return turned_down(sounds)

    def preview(
        self, latents: Float[Tensor, "batch components time"]
    ) -> Float[Tensor, "batch 3 bands frames"]:
        """Return spectrograms as pictures in -1..1, of the mean of all channels.

        One sound is decoded after the other: in the end the decoder has 128 numbers for every
        sample.
        """
        mixed = torch.cat([self.decode(item).mean(dim=1) for item in latents.split(1)])
        spectrogram = picture_spectrogram(self.rate, mixed.shape[1], _PREVIEW_COLUMNS)
        return spectrogram_pictures(spectrogram.log_mel(mixed))

    def items(self, media: Float[Tensor, "batch channels samples"]) -> list[Sound]:
        """Return every waveform as a sound, of one channel where there is no more."""
        waveforms = media.float().cpu()
        if self.num_channels == 1:
            waveforms = waveforms[:, 0]
        return [Sound(samples, self.rate) for samples in waveforms]

    def file(self, item: Sound, metadata: Mapping[str, str]) -> Encoded:
        """Return a sound as a file of the codec's format that carries the metadata."""
        return sound_file(item, metadata, self.format)
