"""A judge of notes: a small network that names instrument and loudness of a sound.

It looks at log-mel spectrograms. That of the built-in model of sounds learned from rendered notes,
and what share of held-out ones it names rightly is in its file. Pitch is judged by others' network
(`evaluate.pitch`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from twostep.errors import TwostepError
from twostep.files import write_atomically
from twostep.training.halves import halved

_METADATA_KEY = "twostep.sound_judge"
_WIDTHS = (32, 64, 96, 128)
_NUM_GROUPS = 8


class SoundJudgeError(TwostepError):
    """A judge's file that is missing or damaged."""


@dataclass(frozen=True, eq=False)
class SoundVerdict:
    """What a judge makes of sounds: logits of every instrument and every loudness."""

    instrument: Float[Tensor, "sounds instruments"]
    loudness: Float[Tensor, "sounds loudnesses"]


class SoundJudge(nn.Module):
    """Convolutions that halve a spectrogram four times, and a layer on what is in all of it.

    Attributes:
        accuracy: shares of held-out notes that it named rightly, by what was asked.
    """

    def __init__(self, instruments: Sequence[str], loudnesses: Sequence[str]) -> None:
        """Make a judge with random weights.

        Args:
            instruments: their names, in the order of the logits.
            loudnesses: the same.
        """
        super().__init__()
        self.instruments = tuple(instruments)
        self.loudnesses = tuple(loudnesses)
        self.accuracy: Mapping[str, float] = {}
        layers: list[nn.Module] = []
        before = 1
        for width in _WIDTHS:
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(_NUM_GROUPS, width),
                nn.SiLU(),
            ]
            before = width
        self.body = nn.Sequential(*layers)
        # Means and largest values over time, for every remaining band.
        self.head = nn.LazyLinear(len(self.instruments) + len(self.loudnesses))

    def forward(self, log_mel: Float[Tensor, "sounds bands frames"]) -> SoundVerdict:
        """Return the verdicts on log-mel spectrograms."""
        made = self.body(log_mel[:, None])
        pooled = torch.cat([made.mean(dim=3), made.amax(dim=3)], dim=1).flatten(1)
        instrument, loudness = self.head(pooled).split(
            [len(self.instruments), len(self.loudnesses)], dim=1
        )
        return SoundVerdict(instrument, loudness)


def save_sound_judge(judge: SoundJudge, path: Path) -> None:
    """Write a judge in half precision, with its classes and its accuracy."""
    described = {
        "instruments": judge.instruments,
        "loudnesses": judge.loudnesses,
        "accuracy": dict(judge.accuracy),
    }
    with write_atomically(path) as file:
        file.write(save(halved(judge.state_dict()), {_METADATA_KEY: json.dumps(described)}))


def load_sound_judge(path: Path) -> SoundJudge:
    """Read a judge; SoundJudgeError if its file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            described = json.loads((file.metadata() or {})[_METADATA_KEY])
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        judge = SoundJudge(described["instruments"], described["loudnesses"])
        judge.load_state_dict(weights)
        judge.accuracy = described["accuracy"]
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise SoundJudgeError(
            f"{path} is no judge of sounds ({error!r}). Train one: twostep pretrain "
            "nano-audio-judge --out runs/nano-audio-judge."
        ) from error
    return judge.eval().requires_grad_(False)
