"""A judge of drum hits: linear, fitted in closed form to spectrograms of real hits.

A hit is where it begins, so its spectrogram is taken from there. Which drum it is, ridge regression
onto the drums says; the largest of its answers is the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.media.spectrogram import Spectrogram

_BANDS = 40
_FRAMES = 24
"""Frames of 16 ms that a verdict rests on, from the beginning of a hit."""

_ONSET = 0.1
"""Share of the largest amplitude at which a hit begins."""

_LOUDEST = 0.5
"""Amplitude that all hits are brought to, so that loudness does not tell drums apart."""

_RIDGE = 30.0
"""Weight of the penalty on squared weights, beside features of variance 1."""

_SPECTROGRAM = Spectrogram(bands=_BANDS)


@dataclass(frozen=True, eq=False)
class DrumJudge:
    """Names drums.

    Args:
        drums: their names, in the order of the verdicts.
        mean: of the features.
        scale: their deviations.
        weights: from features, and a one, to drums.
    """

    drums: tuple[str, ...]
    mean: Float[Tensor, " features"]
    scale: Float[Tensor, " features"]
    weights: Float[Tensor, "features1 drums"]

    def __call__(self, sounds: Float[Tensor, "hits samples"]) -> Int[Tensor, " hits"]:
        """Return the number of the drum of every hit, at 16 kHz."""
        features = (_features(sounds) - self.mean) / self.scale
        verdict: Tensor = (_with_one(features) @ self.weights).argmax(dim=1)
        return verdict


def fit_drum_judge(
    sounds: Float[Tensor, "hits samples"], drums: Int[Tensor, " hits"], names: Sequence[str]
) -> DrumJudge:
    """Fit a judge to hits.

    Args:
        sounds: at 16 kHz.
        drums: the number of each one's drum.
        names: of the drums.
    """
    features = _features(sounds)
    mean = features.mean(dim=0)
    scale = features.std(dim=0).clamp(min=1e-3)
    rows = _with_one((features - mean) / scale)
    targets = torch.nn.functional.one_hot(drums.long(), len(names)).float()
    penalty = _RIDGE * torch.eye(rows.shape[1])
    penalty[-1, -1] = 0
    weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ targets)
    return DrumJudge(tuple(names), mean, scale, weights)


def _features(sounds: Tensor) -> Float[Tensor, "hits features"]:
    """Return the spectrogram of every hit from its beginning, at one loudness, as a row."""
    loudest = sounds.abs().amax(dim=1, keepdim=True).clamp(min=1e-6)
    even = _LOUDEST * sounds.float() / loudest
    length = _SPECTROGRAM.hop * _FRAMES
    begun = torch.zeros(len(even), length)
    for row, sound in enumerate(even):
        first = int((sound.abs() >= _ONSET * _LOUDEST).int().argmax())
        heard = sound[first : first + length]
        begun[row, : len(heard)] = heard
    return _SPECTROGRAM.log_mel(begun).flatten(1)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)
