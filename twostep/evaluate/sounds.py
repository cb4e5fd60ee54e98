"""How well sets of notes are what their prompts say, and how far they are from real ones.

Instrument and loudness are judged by our own judge, pitch by CREPE, which others trained on other
sounds. The distance is Frechet's in CREPE's features; it depends on how many notes are compared, so
compare only figures of the same number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.evaluate.diversity import feature_diversity
from twostep.evaluate.frechet import fit_features, frechet_distance
from twostep.evaluate.pitch import pitches, sound_features
from twostep.evaluate.sound_judge import SoundJudge

TOLERANCE = 0.5
"""Semitones by which a pitch may be off."""

_OCTAVE = 12


@dataclass(frozen=True)
class NoteFigures:
    """Figures of a set of notes.

    Attributes:
        instrument: share whose instrument is right.
        loudness: share whose loudness is right.
        pitch: share whose pitch is right to half a semitone.
        pitch_class: the same, where octaves do not count.
        everything: share in which instrument, loudness and pitch are right.
        distance: Frechet distance to real notes of the same labels.
    """

    instrument: float
    loudness: float
    pitch: float
    pitch_class: float
    everything: float
    distance: float


@torch.no_grad()
def measure_notes(
    sounds: Float[Tensor, "notes samples"],
    log_mel: Float[Tensor, "notes bands frames"],
    labels: Int[Tensor, "notes 3"],
    judge: SoundJudge,
    real: Float[Tensor, "others 512"],
) -> NoteFigures:
    """Return the figures of notes.

    Args:
        sounds: the notes, at 16 kHz.
        log_mel: their spectrograms.
        labels: number of instrument, MIDI number and number of loudness that each should have.
        judge: of instrument and loudness.
        real: features of real notes (`pitch.sound_features`).
    """
    verdict = judge(log_mel)
    instrument = verdict.instrument.argmax(dim=1) == labels[:, 0]
    loudness = verdict.loudness.argmax(dim=1) == labels[:, 2]
    off = pitches(sounds)[0] - labels[:, 1]
    off_in_octave = (off + _OCTAVE / 2) % _OCTAVE - _OCTAVE / 2
    pitch = off.abs() < TOLERANCE
    features = sound_features(sounds)
    return NoteFigures(
        instrument=_share(instrument),
        loudness=_share(loudness),
        pitch=_share(pitch),
        pitch_class=_share(off_in_octave.abs() < TOLERANCE),
        everything=_share(instrument & loudness & pitch),
        distance=frechet_distance(fit_features(features), fit_features(real)),
    )


def note_diversity(
    sounds: Float[Tensor, "notes samples"], prompts: Sequence[Hashable]
) -> float | None:
    """Return the mean distance between notes of one prompt, in CREPE's features.

    None if no prompt has two notes.
    """
    return feature_diversity(sound_features(sounds), prompts)


def _share(hits: Tensor) -> float:
    return float(hits.float().mean())
