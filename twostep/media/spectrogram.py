"""Waveforms as log-mel spectrograms, and back by Griffin-Lim.

A spectrogram is what a codec of sounds works on: magnitudes of a short-time Fourier transform,
summed into bands that are as narrow as an ear tells pitches apart, in decibels. What it loses is
the phase. It is guessed from the tones that the magnitudes show, and then bettered by going back
and forth between waveform and spectrum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import pad

_MEL_SLOPE = 2595.0
_MEL_CORNER = 700.0
"""The mel scale is 2595 log10(1 + f / 700): linear at low frequencies, logarithmic above."""

_MOMENTUM = 0.99
"""Of the fast Griffin-Lim algorithm."""

_ROUNDS = 5
"""Of it: from guessed phases these come nearer than 32 from random ones."""

_UNMIX_ROUNDS = 8
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
        scaled = self._frames(sounds.float()).transpose(1, 2) * (2 / self._window.sum())
        magnitudes = scaled.abs()[..., : self.frames(sounds.shape[1])]
        bands = self._filters.to(sounds.device) @ magnitudes
        decibels = 20 * bands.clamp(min=10 ** (-self.floor_db / 20)).log10()
        return 1 + 2 * decibels / self.floor_db

    def sounds(
        self, log_mel: Float[Tensor, "batch bands frames"], *, rounds: int = _ROUNDS
    ) -> Float[Tensor, "batch samples"]:
        """Return waveforms of spectrograms, the same in every call.

        The fast Griffin-Lim algorithm (Perraudin, Balazs and Sondergaard, 2013), from the phases of
        tones that go on from frame to frame (`_guessed_phases`). Loud spectrograms may reach beyond
        -1 and 1.

        Args:
            log_mel: as `log_mel` returns them.
            rounds: of going from the waveform to its spectrum and back.
        """
        magnitudes = self._magnitudes(log_mel)
        # One more frame, for the transform counts from the first sample to the last.
        magnitudes = torch.cat([magnitudes, magnitudes[..., -1:]], dim=-1).transpose(1, 2)
        angles = self._guessed_phases(magnitudes)
        phases = torch.polar(torch.ones_like(angles), angles)
        before = torch.zeros_like(phases)
        overlaps = self._overlaps(magnitudes.shape[1], magnitudes.device)
        for _ in range(rounds):
            spectrum = self._frames(self._overlapped(magnitudes * phases, overlaps))
            ahead = spectrum - _MOMENTUM / (1 + _MOMENTUM) * before
            before = spectrum
            # Faster than dividing by `ahead.abs()`, and 0 where there is nothing.
            phases = ahead * (ahead.real.square() + ahead.imag.square() + _TINY**2).rsqrt()
        return self._overlapped(magnitudes * phases, overlaps)

    def _guessed_phases(
        self, magnitudes: Float[Tensor, "batch frames frequencies"]
    ) -> Float[Tensor, "batch frames frequencies"]:
        """Return the phases of tones that sound at the peaks of magnitudes.

        As in single-pass spectrogram inversion (Beauregard, Harish and Wyse, 2015): the frequency
        of a peak lies where a parabola through the logarithms of three magnitudes is highest, every
        frequency of the transform turns with the peak that is nearest, and does so from frame to
        frame. Here without a loop over frames: each frequency's turns are added up by themselves.
        """
        num_frequencies = magnitudes.shape[-1]
        numbers = torch.arange(num_frequencies, device=magnitudes.device)
        heights = (magnitudes + _TINY).log()
        below, middle, above = heights[..., :-2], heights[..., 1:-1], heights[..., 2:]
        is_peak = (middle >= below) & (middle > above)
        curvature = (below - 2 * middle + above).clamp(max=-_TINY)
        offsets = ((below - above) / (2 * curvature)).clamp(-0.5, 0.5)
        # The ends, which have one neighbour, count as peaks: no frequency is without one.
        is_peak = pad(is_peak, (1, 1), value=True)
        peaks = numbers + pad(offsets, (1, 1))
        last = torch.where(is_peak, numbers, 0).cummax(dim=-1).values
        after = torch.where(is_peak, numbers, num_frequencies - 1).flip(-1).cummin(dim=-1).values
        after = after.flip(-1)
        nearest = torch.where(after - numbers < numbers - last, after, last)
        turns = peaks.gather(-1, nearest) * self.hop / self.window
        steps = (turns[:, 1:] + turns[:, :-1]) / 2
        # In double precision, for hundreds of turns are added up of which a fraction counts.
        turned = pad(steps.double().cumsum(dim=1), (0, 0, 1, 0))
        # Frames begin half a window before their middle, which is half a turn more a frequency.
        return (2 * math.pi * ((turned + numbers / 2) % 1)).to(magnitudes.dtype)

    def _magnitudes(self, log_mel: Tensor) -> Tensor:
        """Return magnitudes, none below zero, whose bands are nearest to those of spectrograms.

        The multiplicative updates of Lee and Seung (2001) for the Kullback-Leibler divergence,
        which take a quarter of the rounds of those for squares and hear quiet bands too. They keep
        what is zero at zero, so that frequencies between two bands are told by how loud these are.
        """
        quietest = 10 ** (-self.floor_db / 20)
        bands = 10 ** ((log_mel.float() - 1) * self.floor_db / 40)
        # Silence is silence, not noise of the quietest level.
        bands = torch.where(bands > 1.001 * quietest, bands, torch.zeros_like(bands))
        filters = self._filters.to(bands.device)
        spread = self._spread.to(bands.device)
        magnitudes = spread @ (bands / (filters.sum(dim=1, keepdim=True) + _TINY))
        for _ in range(_UNMIX_ROUNDS):
            magnitudes = magnitudes * (spread @ (bands / (filters @ magnitudes + _TINY)))
        return magnitudes

    @cached_property
    def _spread(self) -> Float[Tensor, "frequencies bands"]:
        """How much of each band every frequency gets: shares of 1, or nothing."""
        weights = self._filters.T
        return (weights / weights.sum(dim=1, keepdim=True).clamp(min=_TINY)).contiguous()

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

    def _frames(
        self, sounds: Float[Tensor, "batch samples"]
    ) -> Complex[Tensor, "batch frames frequencies"]:
        """Return the short-time Fourier transform, that of torch.stft with silence around."""
        half = self.window // 2
        padded = pad(sounds, (half, half))
        frames = padded.unfold(-1, self.window, self.hop) * self._window.to(sounds.device)
        spectra: Tensor = torch.fft.rfft(frames)
        return spectra

    def _overlapped(
        self,
        spectra: Complex[Tensor, "batch frames frequencies"],
        overlaps: Float[Tensor, " samples"],
    ) -> Float[Tensor, "batch samples"]:
        """Return the waveform whose transform is nearest to the spectra of frames.

        What torch.istft does, which takes five times as long for a sound of a second.

        Args:
            spectra: of frames, in which the magnitude of a sine is its amplitude.
            overlaps: as `_overlaps` returns them.
        """
        frames = torch.fft.irfft(spectra, n=self.window) * self._window.to(spectra.device)
        sounds: Tensor = self._added_up(frames) / overlaps
        return sounds

    def _added_up(self, frames: Float[Tensor, "batch frames window"]) -> Tensor:
        """Lay frames over each other, and cut off what lies before the first middle's and after."""
        parts = self.window // self.hop
        pieces = frames.unflatten(-1, (parts, self.hop))
        count = frames.shape[1]
        whole = frames.new_zeros(len(frames), count + parts - 1, self.hop)
        for part in range(parts):
            whole[:, part : part + count] += pieces[:, :, part]
        half = self.window // 2
        added: Tensor = whole.flatten(1)[:, half : half + (count - 1) * self.hop]
        return added

    def _overlaps(self, num_frames: int, device: torch.device) -> Float[Tensor, " samples"]:
        """Return what a waveform is divided by after frames were laid over each other."""
        window = self._window.to(device)
        weights = window.square().expand(1, num_frames, -1)
        # Where a sine has the amplitude 1 in the spectrum, and half the window's sum in a frame.
        return self._added_up(weights)[0] * (2 / window.sum())
