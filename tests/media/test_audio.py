"""The codec of sounds and their files: what comes back, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.sounds import tones
from twostep.media.audio import (
    FORMATS,
    AudioCodec,
    AudioError,
    BlockComponents,
    Sound,
    check_usable,
    read_sound,
    sound_file,
    sound_picture,
)
from twostep.media.codec import Codec
from twostep.media.spectrogram import Spectrogram
from twostep.pretrain.notes import fitted_codec

BANDS = 32
LABELS = torch.tensor([(i % 10, 48 + i, i % 2) for i in range(30)], dtype=torch.uint8)


@pytest.fixture(scope="module")
def sounds() -> torch.Tensor:
    return tones(LABELS)


@pytest.fixture(scope="module")
def codec(sounds: torch.Tensor) -> AudioCodec:
    return fitted_codec(AudioCodec(BlockComponents(BANDS, 4, 24), Spectrogram(bands=BANDS)), sounds)


def tone(num_samples: int = 2048, amplitude: float = 0.5, rate: int = 16_000) -> Sound:
    return Sound(amplitude * torch.sin(torch.arange(num_samples) / 5), rate)


def test_it_is_a_codec(codec: AudioCodec) -> None:
    assert isinstance(codec, Codec) and codec.media == "audio"


def test_what_components_lose_is_what_was_left_out(codec: AudioCodec, sounds: torch.Tensor) -> None:
    """The error of principal components is the sum of the smaller singular values, squared."""
    log_mel = codec.spectrogram.log_mel(sounds)
    blocks = log_mel.unflatten(2, (-1, 4)).transpose(1, 2).flatten(2).flatten(0, 1).double()
    values = np.linalg.svd((blocks - blocks.mean(dim=0)).numpy(), compute_uv=False)
    components = codec.network.encode(log_mel)
    rebuilt = (components.transpose(1, 2) * codec.network.scale) @ codec.network.basis
    error = (rebuilt.flatten(0, 1) + codec.network.mean - blocks).square().sum()
    assert float(error) == pytest.approx(float((values[24:] ** 2).sum()), rel=1e-3)


def test_latents_have_unit_variance_and_the_strong_ones_stay_strong(
    codec: AudioCodec, sounds: torch.Tensor
) -> None:
    latents = codec.encode(sounds)
    assert latents.shape == (30, *codec.latent_shape(16_384, 1))
    variances = latents.var(dim=(0, 2))
    assert float(variances.mean()) == pytest.approx(1, rel=0.02)
    assert bool((variances[:-1] >= variances[1:] - 1e-3).all())
    # Divided by the root of the deviation: the ratio of variances is that of deviations.
    deviations = (latents * codec.network.scale[:, None]).std(dim=(0, 2))
    ratio = deviations[0] / deviations[10]
    assert float(variances[0] / variances[10]) == pytest.approx(float(ratio), rel=0.02)


def test_a_note_comes_back(codec: AudioCodec, sounds: torch.Tensor) -> None:
    decoded = codec.decode(codec.encode(sounds[:2]))
    assert decoded.shape == sounds[:2].shape and float(decoded.abs().max()) <= 1
    before, after = (codec.spectrogram.log_mel(each) for each in (sounds[:2], decoded))
    assert float((before - after).abs().mean()) < 0.1


def test_a_preview_is_dark_where_it_is_silent(codec: AudioCodec) -> None:
    quiet = codec.encode(torch.zeros(1, 16_384))
    picture = codec.preview(quiet)
    assert picture.shape == (1, 3, BANDS, 64)
    loud = codec.preview(codec.encode(tones(LABELS[-1:])))
    # Low tones are at the bottom.
    assert float(picture.mean()) < float(loud.mean())
    assert -1 <= float(loud.min()) <= float(loud.max()) <= 1


@pytest.mark.parametrize("size", [(0, 1), (100, 1), (1025, 1), (16_384, 2)])
def test_lengths_that_are_no_blocks_are_refused(codec: AudioCodec, size: tuple[int, int]) -> None:
    with pytest.raises(AudioError, match="multiple of 1024, by 1, such as 16384x1"):
        codec.latent_shape(*size)
    if size[1] == 1:
        with pytest.raises(AudioError, match="multiple of 1024"):
            codec.encode(torch.zeros(1, size[0]))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_brings_back_sound_and_metadata(format: str, tmp_path: Path) -> None:
    metadata = {"twostep": '{"long": "' + 5000 * "x" + '"}', "parameters": "ein Flötenton ♪"}
    encoded = sound_file(tone(), metadata, format)
    path = tmp_path / f"note{encoded.suffix}"
    path.write_bytes(encoded.data)
    sound, found = read_sound(path, rate=16_000)
    assert found == metadata and sound.rate == 16_000 and encoded.mime == f"audio/{format}"
    tolerance = 0.05 if format == "ogg" else 1 / 32_768
    assert float((sound.samples - tone().samples).abs().max()) <= tolerance


def test_other_programs_files_have_no_metadata(tmp_path: Path) -> None:
    import soundfile

    path = tmp_path / "other.wav"
    soundfile.write(path, np.full((400, 2), 0.25), 8000)
    sound, metadata = read_sound(path)
    assert metadata == {} and sound.seconds == 0.05
    assert float((sound.samples - 0.25).abs().max()) < 1e-4
    with pytest.raises(AudioError, match="has 8000 samples a second; expected 16000"):
        read_sound(path, rate=16_000)
    soundfile.write(path, np.zeros((0, 1)), 8000)
    with pytest.raises(AudioError, match="has no samples"):
        read_sound(path)
    for data in (b"", b"RIFF", b"no sound at all"):
        path.write_bytes(data)
        with pytest.raises(AudioError, match="cannot be read as a sound"):
            read_sound(path)
    with pytest.raises(AudioError, match="cannot be read as a sound"):
        read_sound(tmp_path / "nowhere.wav")


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        (torch.zeros(0), "it has no samples"),
        (torch.tensor([0.0, float("nan")]), "it holds NaN or infinity"),
        (torch.tensor([0.0, -1.5]), "it reaches 1.50, beyond -1 and 1; turn it down"),
    ],
)
def test_what_is_no_sound_is_neither_written_nor_used(samples: torch.Tensor, problem: str) -> None:
    with pytest.raises(AudioError, match=f"cannot be written: {problem}"):
        sound_file(Sound(samples, 16_000), {})
    with pytest.raises(AudioError, match=f"cannot be used: {problem}"):
        check_usable(Sound(samples, 16_000))


def test_silent_and_clipped_sounds_are_refused() -> None:
    check_usable(tone())
    with pytest.raises(AudioError, match="it is silent"):
        check_usable(tone(amplitude=1e-5))
    clipped = Sound((3 * tone().samples).clamp(-1, 1), 16_000)
    share = 100 * float((clipped.samples.abs() >= 0.999).float().mean())
    with pytest.raises(AudioError, match=f"{share:.1f} % of its samples"):
        check_usable(clipped)


def test_an_unknown_format_and_a_missing_library_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AudioError, match="no format 'mp3'; expected wav, flac, ogg"):
        sound_file(tone(), {}, "mp3")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(AudioError, match=r"pip install 'twostep\[media\]'"):
        sound_file(tone(), {})


@pytest.mark.parametrize("format", FORMATS)
def test_two_channels_come_back(format: str, tmp_path: Path) -> None:
    left, right = tone().samples, tone(amplitude=0.25).samples
    stereo = Sound(torch.stack([left, right]), 16_000)
    assert (stereo.num_channels, len(stereo), stereo.seconds) == (2, 2048, 0.128)
    path = tmp_path / f"stereo.{format}"
    path.write_bytes(sound_file(stereo, {"prompt": "rain"}, format).data)
    sound, metadata = read_sound(path, mixed=False)
    assert metadata == {"prompt": "rain"}
    tolerance = 0.05 if format == "ogg" else 1 / 32_768
    assert float((sound.samples - stereo.samples).abs().max()) <= tolerance
    mixed, _ = read_sound(path)
    assert mixed.samples.shape == (2048,)
    assert float((mixed.samples - (left + right) / 2).abs().max()) <= tolerance
    assert torch.equal(stereo.mixed, stereo.samples.mean(dim=0))
    check_usable(stereo)
    with pytest.raises(AudioError, match=r"\[3, 2048\]; expected one channel, or two"):
        sound_file(Sound(torch.zeros(3, 2048), 16_000), {})


def test_the_picture_of_a_long_sound_stays_small() -> None:
    long = Sound(torch.zeros(2, 44_100 * 30), 44_100)
    assert sound_picture(long).size == (2051, 128)
    assert sound_picture(tone(16_384)).size == (256, 128)
