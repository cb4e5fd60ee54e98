"""Spectrograms: what is known of sines and silence, and waveforms that come back."""

import pytest
import torch

from twostep.media.spectrogram import Spectrogram

SPECTROGRAM = Spectrogram()


def sine(hertz: float, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(16_384) / 16_000)[None]


def test_half_the_amplitude_is_six_decibels_less() -> None:
    loud, soft = (SPECTROGRAM.log_mel(sine(1000, amplitude))[..., 4:-4] for amplitude in (0.8, 0.4))
    heard = soft > -0.9
    # Twice 20 log10(2) of the 80 dB from -1 to 1.
    assert (loud - soft)[heard] == pytest.approx(2 * 6.0206 / 80, abs=1e-4)


def test_a_full_sine_is_one_in_its_band_and_silent_far_from_it() -> None:
    # At the middle of a bin of the transform, so that its magnitude is 1 there and 1/2 beside.
    log_mel = SPECTROGRAM.log_mel(sine(1000))[0, :, 30]
    assert 0.9 < float(log_mel.max()) < 1.1
    mels = torch.linspace(0, 1, 130)[1:-1]
    place = float(mels[log_mel.argmax()])
    expected = (1000.0 - 64.4) / (2840.0 - 64.4)  # mel of 1000, 40 and 8000 Hz
    assert place == pytest.approx(expected, abs=1 / 129)
    assert float(log_mel[:20].max()) == -1 and float(log_mel[-20:].max()) == -1


def test_triangles_add_up_to_one_between_the_outer_bands() -> None:
    sums = SPECTROGRAM._filters.sum(dim=0)
    inside = SPECTROGRAM._filters.argmax(dim=0)
    between = (inside > 0) & (inside < SPECTROGRAM.bands - 1)
    assert torch.allclose(sums[between], torch.ones(int(between.sum())), atol=1e-5)


def test_silence_stays_silence() -> None:
    log_mel = SPECTROGRAM.log_mel(torch.zeros(1, 4096))
    assert bool((log_mel == -1).all())
    assert float(SPECTROGRAM.sounds(log_mel).abs().max()) == 0


@pytest.mark.parametrize("hertz", [131.0, 440.0, 1975.0])
def test_a_tone_comes_back_at_its_pitch_and_its_loudness(hertz: float) -> None:
    tone = sine(hertz, 0.5)
    back = SPECTROGRAM.sounds(SPECTROGRAM.log_mel(tone))
    assert back.shape == tone.shape
    spectrum = torch.fft.rfft(back[0] * torch.hann_window(back.shape[1])).abs()
    # A quarter of a semitone.
    assert float(spectrum.argmax()) * 16_000 / 16_384 == pytest.approx(hertz, rel=0.015)
    level = back.square().mean().sqrt()
    assert float(level) == pytest.approx(0.5 / 2**0.5, rel=0.15)
    assert torch.equal(back, SPECTROGRAM.sounds(SPECTROGRAM.log_mel(tone)))


def test_frames_and_what_is_made_of_them_are_those_of_torch() -> None:
    sounds = torch.randn(2, 16 * 256, generator=torch.Generator().manual_seed(0))
    window = torch.hann_window(1024)
    expected = torch.stft(
        sounds, 1024, 256, window=window, pad_mode="constant", return_complex=True
    )
    frames = SPECTROGRAM._frames(sounds)
    assert torch.allclose(frames, expected.transpose(1, 2), atol=1e-4)
    # Spectra that belong to no waveform, so that the nearest one is asked for.
    spectra = frames * torch.rand(frames.shape, generator=torch.Generator().manual_seed(1))
    scaled = spectra * (2 / window.sum())
    back = SPECTROGRAM._overlapped(scaled, SPECTROGRAM._overlaps(17, sounds.device))
    nearest = torch.istft(spectra.transpose(1, 2), 1024, 256, window=window, length=16 * 256)
    assert torch.allclose(back, nearest, atol=1e-5)


@pytest.mark.parametrize("hertz", [196.0, 440.0, 1046.5])
def test_phases_that_are_guessed_are_nearly_those_of_a_tone(hertz: float) -> None:
    tone = sine(hertz, 0.5)
    guessed = SPECTROGRAM.sounds(SPECTROGRAM.log_mel(tone), rounds=0)[0, 2048:-2048]
    # Frames whose phases do not fit each other put each other out.
    level = float(guessed.square().mean().sqrt())
    assert level == pytest.approx(0.5 / 2**0.5, rel=0.15)


def test_rounds_bring_a_chord_nearer_to_its_spectrogram() -> None:
    chord = sine(262, 0.2) + sine(330, 0.2) + sine(392, 0.2)
    fades = torch.linspace(1, 0.05, chord.shape[1])
    log_mel = SPECTROGRAM.log_mel(chord * fades)

    def distance(rounds: int) -> float:
        again = SPECTROGRAM.log_mel(SPECTROGRAM.sounds(log_mel, rounds=rounds))
        return float((again - log_mel).abs().mean())

    assert distance(5) < 0.75 * distance(0)
    assert distance(5) < 0.03


def test_magnitudes_have_the_bands_that_were_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    bands = 10 ** (-3 * torch.rand(1, 128, 4, generator=generator))
    smooth = SPECTROGRAM._filters @ SPECTROGRAM._filters.T @ bands
    log_mel = 1 + 40 * smooth.log10() / 80
    found = SPECTROGRAM._filters @ SPECTROGRAM._magnitudes(log_mel)
    assert bool((SPECTROGRAM._magnitudes(log_mel) >= 0).all())
    assert float((found - smooth).norm() / smooth.norm()) < 0.03
