"""The training of the judge of notes, on rendered ones that are mildly damaged anew every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from twostep.evaluate.sound_judge import SoundJudge, load_sound_judge, save_sound_judge
from twostep.files import write_atomically
from twostep.media.spectrogram import Spectrogram
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.notes import (
    INSTRUMENTS,
    LOUDNESSES,
    Labels,
    random_labels,
    render_notes,
)
from twostep.training.device import find_device
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import wait, world
from twostep.training.run_folder import RunFolder

SOUND_JUDGE_FILE = "sound_judge.safetensors"

_TRAINING, _HELD_OUT, _NEW_PITCHES = -1, -2, -3
"""Iterations whose randomness draws the notes: training never gets there."""

_MOST_NOISE = 0.1
"""Deviation of the strongest noise that is put on spectrograms, whose values are -1 to 1."""


class SoundJudgeSettings(PartSettings):
    """The recipe of a judge of notes."""

    learns_from_drawings: ClassVar[bool] = False

    part: Literal["sound-judge"] = "sound-judge"
    notes: int = Field(3000, gt=0, description="notes that it learns from")
    held_out_notes: int = Field(
        500, gt=0, description="notes by which it is measured, of each kind"
    )
    soundfont: Path | None = Field(None, description="the file; that of the system if not given")


def train_sound_judge(
    settings: SoundJudgeSettings, out: Path, on_iteration: OnIteration = silent
) -> SoundJudge:
    """Train a judge and write it and `eval.json` to the run folder `out`.

    The accuracy stated is that of the file as written, on notes that were rendered anew: of the
    combinations of instrument and pitch that it learned from, and of those that are held out.
    """
    folder = RunFolder(out, settings)
    settings = folder.settled(settings)
    device = find_device(settings.device)
    spectrograms, labels = _render(settings, settings.notes, _TRAINING)
    judge = SoundJudge(tuple(INSTRUMENTS), LOUDNESSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        judge(spectrograms[:2].float())
    judge.to(device).train()
    batch_size = settings.loop.batch_size

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        share = world().share(batch_size)
        chosen = spectrograms[rows].float()
        deviation = _MOST_NOISE * torch.rand(batch_size, 1, 1, generator=generator)
        noisy = chosen + deviation * torch.randn(chosen.shape, generator=generator)
        verdict = judge(noisy.clamp(-1, 1)[share].to(device))
        right = labels[rows][share].long().to(device)
        instrument = cross_entropy(verdict.instrument.float(), right[:, 0])
        return instrument + cross_entropy(verdict.loudness.float(), right[:, 2])

    train_network(judge, loss, settings.loop, folder, name="sound-judge", on_iteration=on_iteration)
    path = out / SOUND_JUDGE_FILE
    if world().is_first:
        save_sound_judge(judge.cpu(), path)
        judge = load_sound_judge(path)
        judge.accuracy = {
            **_accuracy(judge, settings, _HELD_OUT),
            **_accuracy(judge, settings, _NEW_PITCHES),
        }
        save_sound_judge(judge, path)
        with write_atomically(out / "eval.json") as file:
            file.write(json.dumps(judge.accuracy, indent=2).encode())
    wait()
    return load_sound_judge(path)


def _render(settings: SoundJudgeSettings, count: int, purpose: int) -> tuple[Tensor, Labels]:
    """Return spectrograms in half precision, and labels, of notes for a purpose."""
    random = Randomness.at(settings.loop.seed, purpose)
    labels = random_labels(count, random.tensors, held_out=purpose == _NEW_PITCHES)
    sounds = render_notes(labels, random.words.getrandbits(31), soundfont=settings.soundfont)
    spectrogram = Spectrogram()
    parts = [spectrogram.log_mel(part).half() for part in sounds.split(128)]
    return torch.cat(parts), labels


@torch.no_grad()
def _accuracy(judge: SoundJudge, settings: SoundJudgeSettings, purpose: int) -> dict[str, float]:
    """Return the shares of fresh notes that are named rightly."""
    spectrograms, labels = _render(settings, settings.held_out_notes, purpose)
    verdict = judge(spectrograms.float())
    suffix = "_new_pitches" if purpose == _NEW_PITCHES else ""
    hits = {
        "instrument": verdict.instrument.argmax(dim=1) == labels[:, 0],
        "loudness": verdict.loudness.argmax(dim=1) == labels[:, 2],
    }
    return {f"{name}{suffix}": round(float(hit.float().mean()), 4) for name, hit in hits.items()}
