"""The judges of chords and drum hits, on tones and noises that need no soundfont."""

import pytest
import torch
from torch import Tensor

from twostep.evaluate.chords import chroma, name_chords
from twostep.pretrain.chords import CHORDS, pitch_classes
from twostep.pretrain.drum_judge import fit_drum_judge

SECONDS = torch.arange(16_384) / 16_000
EVERY = sorted({pitch_classes(root, kind) for root in range(12) for kind in range(4)}, key=sorted)


def strummed(pitches: list[int]) -> Tensor:
    """Return notes struck together, with overtones, that die away."""
    sound = torch.zeros(len(SECONDS))
    for pitch in pitches:
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        for number in range(1, 7):
            sound += 0.7**number * (2 * torch.pi * number * hertz * SECONDS).sin()
    return 0.05 * sound * (-2 * SECONDS).exp()


def test_every_chord_is_named_at_every_root() -> None:
    wanted, sounds = [], []
    for root in range(48, 72):
        for kind, steps in enumerate(CHORDS.values()):
            wanted.append(pitch_classes(root, kind))
            sounds.append(strummed([root + step for step in steps]))
    heard = name_chords(torch.stack(sounds), EVERY)
    assert sum(a == b for a, b in zip(heard, wanted, strict=True)) >= 0.95 * len(wanted)


def test_a_wrong_note_is_another_chord() -> None:
    major, minor = pitch_classes(60, 0), pitch_classes(60, 1)
    sounds = torch.stack([strummed([60, 64, 67]), strummed([60, 63, 67])])
    assert name_chords(sounds, [major, minor]) == [major, minor]


def test_one_note_is_one_class_whatever_its_octave() -> None:
    found = chroma(torch.stack([strummed([48]), strummed([60]), strummed([72])]))
    assert found.argmax(dim=1).tolist() == [0, 0, 0]
    assert found.sort(dim=1).values[:, -2].max() < 0.3
    silence = chroma(torch.zeros(1, len(SECONDS)))
    assert bool(silence.isfinite().all())


def hits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return low thumps and bursts of noise by turns, at random moments and as loud."""
    generator = torch.Generator().manual_seed(seed)
    drums = torch.arange(count) % 2
    sounds = []
    for drum in drums.tolist():
        fall = (-30 * SECONDS).exp()
        hertz = 50 + 40 * float(torch.rand(1, generator=generator))
        thump = (2 * torch.pi * hertz * SECONDS).sin()
        noise = torch.randn(len(SECONDS), generator=generator) / 4
        loud = 0.05 + 0.9 * float(torch.rand(1, generator=generator))
        start = int(800 * float(torch.rand(1, generator=generator)))
        sounds.append(loud * torch.roll((noise if drum else thump) * fall, start))
    return torch.stack(sounds), drums


def test_drums_are_told_apart_however_loud_and_late() -> None:
    judge = fit_drum_judge(*hits(40, seed=0), names=["thump", "noise"])
    sounds, drums = hits(40, seed=1)
    assert judge(sounds).tolist() == drums.tolist()
    assert judge(0.1 * sounds).tolist() == drums.tolist()
    # What it is fitted to is what it says, not an order.
    turned = fit_drum_judge(hits(40, seed=0)[0], 1 - hits(40, seed=0)[1], names=["noise", "thump"])
    assert turned(sounds).tolist() == (1 - drums).tolist()


def test_the_classes_of_a_chord_do_not_depend_on_its_octave() -> None:
    assert pitch_classes(48, 3) == pitch_classes(60, 3) == {0, 4, 7, 10}
    assert pitch_classes(71, 1) == {11, 2, 6}
    with pytest.raises(IndexError):
        pitch_classes(60, len(CHORDS))
