"""A judge of chords that nobody trained: which pitch classes sound, by what overtones explain.

The magnitudes of a sound, on a scale of thirds of a semitone, are taken for a sum of notes, none of
them negative, each with overtones that fall off evenly. What notes of one class have together is
its chroma. A chord is the one whose notes hold the largest share of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

RATE = 16_000
"""Samples a second of what the judge hears."""

_CLASSES = 12
_LOWEST, _HIGHEST = 48, 82
"""MIDI numbers of the notes that may sound: C3 to B flat 5, those of the chords that there are.

What sounds above is then an overtone.
"""

_BINS_PER_SEMITONE = 3
_LOWEST_BIN, _HIGHEST_BIN = 43.0, 118.0
"""MIDI numbers where the scale begins and ends."""

_OVERTONES = 8
_FALL = 0.5
"""Amplitude of each overtone, of the one before it."""

_WIDTH = 0.25
"""Deviation of a partial on the scale, in semitones."""

_ROUNDS = 60
_TINY = 1e-9
_START, _END = 0.08, 0.6
"""The seconds that are heard: after the strike, before notes are let go."""

_LEAST = 0.02
"""Share of the largest magnitude below which all is noise."""


@torch.no_grad()
def chroma(sounds: Float[Tensor, "sounds samples"]) -> Float[Tensor, "sounds 12"]:
    """Return how much of every pitch class sounds, C first; the largest is 1.

    Args:
        sounds: at 16 kHz.
    """
    heard = sounds[:, int(_START * RATE) : int(_END * RATE)].float()
    window = torch.hann_window(heard.shape[1])
    spectrum = torch.fft.rfft(heard * window, n=4 * RATE).abs()
    wanted = spectrum.sqrt() @ _scale()
    wanted = (wanted - _LEAST * wanted.amax(dim=1, keepdim=True)).clamp(min=0)
    notes = _notes()
    products = wanted @ notes.T
    mixed = notes @ notes.T
    strengths = products
    for _ in range(_ROUNDS):
        # Lee and Seung (2001): what is zero stays so, and nothing becomes negative.
        strengths = strengths * products / (strengths @ mixed + _TINY)
    classes = torch.zeros(len(sounds), _CLASSES)
    places = torch.arange(_LOWEST, _HIGHEST + 1) % _CLASSES
    classes.index_add_(1, places, strengths)
    return classes / classes.amax(dim=1, keepdim=True).clamp(min=_TINY)


def name_chords(
    sounds: Float[Tensor, "sounds samples"], chords: Sequence[frozenset[int]]
) -> list[frozenset[int]]:
    """Return of every sound which of some sets of pitch classes it is nearest to.

    Nearest is the largest cosine between the root of its chroma, which lifts what is soft, and the
    set, in which every class counts alike.

    Args:
        sounds: at 16 kHz.
        chords: the sets that there are; pitch classes are 0 for C to 11.
    """
    sets = torch.zeros(len(chords), _CLASSES)
    for row, classes in enumerate(chords):
        sets[row, sorted(classes)] = 1
    sets = sets / sets.norm(dim=1, keepdim=True)
    best = (chroma(sounds).sqrt() @ sets.T).argmax(dim=1)
    return [chords[row] for row in best.tolist()]


def _centres() -> Tensor:
    """Return the MIDI numbers of the scale's bins."""
    count = int((_HIGHEST_BIN - _LOWEST_BIN) * _BINS_PER_SEMITONE) + 1
    return _LOWEST_BIN + torch.arange(count) / _BINS_PER_SEMITONE


@cache
def _scale() -> Float[Tensor, "frequencies bins"]:
    """Return how much of every frequency falls into every bin: triangles, one bin wide."""
    frequencies = torch.arange(2 * RATE + 1) / 4
    midi = 69 + 12 * (frequencies.clamp(min=1) / 440).log2()
    far = (midi[:, None] - _centres()).abs() * _BINS_PER_SEMITONE
    triangles = (1 - far).clamp(min=0)
    # High bins hold more frequencies; each counts by their mean.
    scale: Tensor = triangles / triangles.sum(dim=0, keepdim=True).clamp(min=_TINY)
    return scale


@cache
def _notes() -> Float[Tensor, "notes bins"]:
    """Return the magnitudes of every note on the scale, each of norm 1."""
    midi = torch.arange(_LOWEST, _HIGHEST + 1).float()
    centres = _centres()
    notes = torch.zeros(len(midi), len(centres))
    for number in range(1, _OVERTONES + 1):
        partial = midi + 12 * torch.tensor(float(number)).log2()
        far = (centres - partial[:, None]) / _WIDTH
        # Spectra are compared by their roots, so these fall by the root too.
        notes += _FALL ** ((number - 1) / 2) * (-far.square() / 2).exp()
    normed: Tensor = notes / notes.norm(dim=1, keepdim=True)
    return normed
