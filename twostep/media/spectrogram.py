"""Waveforms as log-mel spectrograms, and back by Griffin-Lim.

A spectrogram is what a codec of sounds works on: magnitudes of a short-time Fourier transform,
summed into bands that are as narrow as an ear tells pitches apart, in decibels. What it loses is
the phase, which is found again by going back and forth between waveform and spectrum until both
agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

_MEL_SLOPE = 2595.0
_MEL_CORNER = 700.0
"""The mel scale is 2595 log10(1 + f / 700): linear at low frequencies, logarithmic above."""

_MOMENTUM = 0.99
"""Of the fast Griffin-Lim algorithm."""

_UNMIX_ROUNDS = 20
"""Rounds in which magnitudes of frequencies are found that sum up to those of the bands."""

_TINY = 1e-9


@dataclass(frozen=True)
class Spectrogram:
    """How waveforms become log-mel spectrograms, and these waveforms again.

    Args:
        rate: Samples a second.
        window: Samples of one transform; it can tell tones apart that are rate / window Hz apart.
        hop: Samples from one frame to the next.
        bands: Frequencies' bands, evenly spaced on the mel scale.
        lowest_hz: Where the lowest band begins; the highest ends at half the rate.
        floor_db: What is taken for silence, in decibels below a sine of amplitude 1.
    """

    rate: int = 16_000
    window: int = 1024
    hop: int = 256
    bands: int = 128
    lowest_hz: float = 40.0
    floor_db: float = 80.0

    def frames(self, num_samples: int) -> int:
        """Return the number of frames of so many samples; what is left over is cut off."""
        return num_samples // self.hop

    def log_mel(
        self, sounds: Float[Tensor, "batch samples"]
    ) -> Float[Tensor, "batch bands frames"]:
        """Return spectrograms: -1 is silence, 1 a sine of amplitude 1."""
        magnitudes = self._transform(sounds).abs()[..., : self.frames(sounds.shape[1])]
        bands = self._filters.to(sounds.device) @ magnitudes
        decibels = 20 * bands.clamp(min=10 ** (-self.floor_db / 20)).log10()
        return 1 + 2 * decibels / self.floor_db

    def sounds(
        self, log_mel: Float[Tensor, "batch bands frames"], *, rounds: int = 32
    ) -> Float[Tensor, "batch samples"]:
        """Return waveforms of spectrograms, the same in every call.

        The fast Griffin-Lim algorithm (Perraudin, Balazs and Sondergaard, 2013), from phases that
        are drawn once. Loud spectrograms may reach beyond -1 and 1.

        Args:
            log_mel: as `log_mel` returns them.
            rounds: of going from the waveform to its spectrum and back.
        """
        magnitudes = self._magnitudes(log_mel)
        # One more frame, for the transform counts from the first sample to the last.
        magnitudes = torch.cat([magnitudes, magnitudes[..., -1:]], dim=-1)
        num_samples = self.hop * log_mel.shape[-1]
        turns = torch.rand(magnitudes.shape[1:], generator=torch.Generator().manual_seed(0))
        phases = torch.polar(torch.ones_like(turns), 2 * math.pi * turns).to(magnitudes.device)
        phases = phases.expand_as(magnitudes)
        before = torch.zeros_like(phases)
        for _ in range(rounds):
            spectrum = self._transform(self._waveform(magnitudes * phases, num_samples))
            ahead = spectrum - _MOMENTUM / (1 + _MOMENTUM) * before
            before = spectrum
            phases = ahead / (ahead.abs() + _TINY)
        return self._waveform(magnitudes * phases, num_samples)

    def _magnitudes(self, log_mel: Tensor) -> Tensor:
        """Return magnitudes, none below zero, whose bands are nearest to those of spectrograms.

        The multiplicative updates of Lee and Seung (2001), which keep what is zero at zero, so that
        frequencies between two bands are told by how loud these are.
        """
        quietest = 10 ** (-self.floor_db / 20)
        bands = 10 ** ((log_mel.float() - 1) * self.floor_db / 40)
        # Silence is silence, not noise of the quietest level.
        bands = torch.where(bands > 1.001 * quietest, bands, torch.zeros_like(bands))
        filters = self._filters.to(bands.device)
        wanted = filters.T @ bands
        mixed = filters.T @ filters
        magnitudes = wanted
        for _ in range(_UNMIX_ROUNDS):
            magnitudes = magnitudes * wanted / (mixed @ magnitudes + _TINY)
        return magnitudes

    @cached_property
    def _filters(self) -> Float[Tensor, "bands frequencies"]:
        """Triangles on the mel scale, each 1 at the middle of its band."""
        lowest, highest = (
            _MEL_SLOPE * math.log10(1 + hertz / _MEL_CORNER)
            for hertz in (self.lowest_hz, self.rate / 2)
        )
        mels = torch.linspace(lowest, highest, self.bands + 2)
        edges = _MEL_CORNER * (10 ** (mels / _MEL_SLOPE) - 1)
        below, middle, above = (edges[i : self.bands + i, None] for i in range(3))
        frequencies = torch.arange(self.window // 2 + 1) * self.rate / self.window
        rising = (frequencies - below) / (middle - below)
        falling = (above - frequencies) / (above - middle)
        return torch.minimum(rising, falling).clamp(min=0)

    @cached_property
    def _window(self) -> Float[Tensor, " window"]:
        return torch.hann_window(self.window)

    def _transform(self, sounds: Tensor) -> Tensor:
        """Return the short-time Fourier transform; the magnitude of a sine is its amplitude."""
        window = self._window.to(sounds.device)
        spectrum = torch.stft(
            sounds.float(),
            self.window,
            self.hop,
            window=window,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum * (2 / window.sum())

    def _waveform(self, spectrum: Tensor, num_samples: int) -> Tensor:
        """Return the waveform whose transform is nearest to a spectrum."""
        window = self._window.to(spectrum.device)
        scaled = spectrum * (window.sum() / 2)
        return torch.istft(scaled, self.window, self.hop, window=window, length=num_samples)
