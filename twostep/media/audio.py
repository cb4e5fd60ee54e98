"""The codec of sounds: log-mel spectrograms in blocks, and files of waveforms.

Latents are the principal components of short stretches of a spectrogram, so they have two
dimensions, components and time. The waveform of a decoded spectrogram is found by Griffin-Lim.
Files are written and read by soundfile, with what a sound says of its origin in their comment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor, nn

from twostep.errors import TwostepError, reason_of
from twostep.media.codec import Encoded
from twostep.media.comments import object_in
from twostep.media.image import to_images
from twostep.media.spectrogram import Spectrogram

FORMATS = {
    "wav": ("PCM_16", "audio/wav"),
    "flac": ("PCM_16", "audio/flac"),
    "ogg": ("VORBIS", "audio/ogg"),
}
"""Kinds of files by their endings: how soundfile calls their samples, and their MIME types."""

LEVELS = 32_768
"""Steps from 0 to 1 in which files of 16 bits keep samples."""

CLIPPED_SHARE = 0.001
"""Share of a sound's samples at its largest value above which it counts as clipped."""

_MOST_CHANNELS = 2
"""Of a sound that is written: left and right."""

_SILENCE = 1e-4
"""Amplitude below which all of a sound counts as silent, -80 dB."""

_FULL_SCALE = 0.999
"""Amplitude from which samples count as at the largest value."""

_PICTURE_HOP = 64
"""Samples from column to column of a spectrogram that is shown: finer than what codecs keep."""

_PICTURE_COLUMNS = 2048
"""Of the spectrogram of a long sound, at most about so many; its hop is longer then."""

_PICTURE_WINDOW = 1024
_PICTURE_RATE = 16_000
"""Samples of one transform where there are so many a second; at higher rates it is longer, or
the lowest bands would lie between two frequencies.
"""

_LEAST_DEVIATION = 1e-3
"""Of a component; directions in which spectrograms do not vary would be blown up."""


class AudioError(TwostepError):
    """A sound that cannot be read, written or used."""


@dataclass(frozen=True, eq=False)
class Sound:
    """A waveform: samples in -1..1 on the CPU, and how many there are a second.

    Args:
        samples: Of one channel [samples], of two, left and right, [2, samples].
        rate: Samples a second in each channel.
    """

    samples: Float[Tensor, "*channels samples"] = field(repr=False)
    rate: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self) / self.rate

    @property
    def num_channels(self) -> int:
        """How many channels it has."""
        return 1 if self.samples.ndim == 1 else len(self.samples)

    @property
    def mixed(self) -> Float[Tensor, " samples"]:
        """The mean of all channels."""
        return self.samples if self.samples.ndim == 1 else self.samples.mean(dim=0)

    def __len__(self) -> int:
        """Return how many samples each channel has."""
        return int(self.samples.shape[-1])


class BlockComponents(nn.Module):
    """Blocks of a spectrogram <-> their principal components: a linear autoencoder.

    A component is divided by the root of its deviation, so that the strong ones stay stronger, as
    the low frequencies of pictures are, and the weak ones are not lost in noise at once. The whole
    is scaled to unit variance.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, bands: int, frames: int, components: int) -> None:
        """Take the first values of a block for its components, until `fit` was called.

        Args:
            bands: of a spectrogram.
            frames: of one block.
            components: that are kept of a block.
        """
        super().__init__()
        self.bands = bands
        self.frames = frames
        self.components = components
        size = bands * frames
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size)[:components].clone())
        self.register_buffer("scale", torch.ones(components))

    def fit(self, log_mel: Float[Tensor, "batch bands frames"]) -> None:
        """Take mean, components and scale of spectrograms."""
        blocks = self._blocks(log_mel).flatten(0, 1).double()
        mean = blocks.mean(dim=0)
        # Eigenvalues rise.
        variances, directions = torch.linalg.eigh(torch.cov((blocks - mean).T))
        variances = variances.flip(0)[: self.components]
        deviations = variances.clamp(min=_LEAST_DEVIATION**2).sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(directions.T.flip(0)[: self.components])
        # Divided by their roots, deviations have the variances `deviations`; all are brought to 1.
        self.scale.copy_((deviations * deviations.mean()).sqrt())

    def encode(
        self, log_mel: Float[Tensor, "batch bands frames"]
    ) -> Float[Tensor, "batch components blocks"]:
        """Return the components of every block, of about unit variance."""
        components: Tensor = (self._blocks(log_mel) - self.mean) @ self.basis.T / self.scale
        return components.transpose(1, 2)

    def decode(
        self, components: Float[Tensor, "batch components blocks"]
    ) -> Float[Tensor, "batch bands frames"]:
        """Return the spectrograms of components, cut off at -1 and 1."""
        blocks: Tensor = (components.transpose(1, 2) * self.scale) @ self.basis + self.mean
        by_band = blocks.unflatten(2, (self.bands, self.frames)).transpose(1, 2)
        spectrogram: Tensor = by_band.flatten(2)
        return spectrogram.clamp(-1, 1)

    def _blocks(self, log_mel: Tensor) -> Tensor:
        """Cut spectrograms into blocks [batch, blocks, bands * frames]."""
        blocks: Tensor = log_mel.unflatten(2, (-1, self.frames)).transpose(1, 2)
        return blocks.flatten(2)


@dataclass(frozen=True, eq=False)
class AudioCodec:
    """Waveforms [batch, samples] in -1..1 <-> latents [batch, components, blocks].

    A size is the number of samples by 1.

    Args:
        network: Spectrograms to components and back.
        spectrogram: Waveforms to spectrograms and back.
        format: The kind of file, one of `FORMATS`.
    """

    network: BlockComponents
    spectrogram: Spectrogram = field(default_factory=Spectrogram)
    format: str = "wav"

    @property
    def media(self) -> str:
        """The medium, as contracts name it."""
        return "audio"

    @property
    def block_samples(self) -> int:
        """Samples that one block of latents stands for."""
        return self.spectrogram.hop * self.network.frames

    def latent_shape(self, width: int, height: int) -> tuple[int, int]:
        """Return (components, blocks) for so many samples by 1.

        Raises AudioError for a length that is no whole number of blocks.
        """
        blocks, rest = divmod(width, self.block_samples)
        if height != 1 or blocks < 1 or rest:
            raise AudioError(
                f"a sound of {width}x{height} cannot be made: its length in samples is a multiple "
                f"of {self.block_samples}, by 1, such as {16 * self.block_samples}x1."
            )
        return self.network.components, blocks

    @torch.no_grad()
    def encode(
        self, media: Float[Tensor, "batch samples"]
    ) -> Float[Tensor, "batch components blocks"]:
        """Return latents of waveforms, whose length is a multiple of a block's.

        Raises AudioError for other lengths.
        """
        self.latent_shape(media.shape[1], 1)
        log_mel = self.spectrogram.log_mel(media).to(self.network.mean.dtype)
        return self.network.encode(log_mel).to(media.dtype).contiguous()

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch components blocks"]
    ) -> Float[Tensor, "batch samples"]:
        """Return waveforms, turned down where they would reach beyond -1 and 1."""
        sounds = self.spectrogram.sounds(self._spectrograms(latents))
        return turned_down(sounds)

    @torch.no_grad()
    def preview(
        self, latents: Float[Tensor, "batch components blocks"]
    ) -> Float[Tensor, "batch 3 bands frames"]:
        """Return spectrograms as pictures in -1..1: low tones at the bottom, silence black."""
        return spectrogram_pictures(self._spectrograms(latents))

    def items(self, media: Float[Tensor, "batch samples"]) -> list[Sound]:
        """Return every waveform as a sound."""
        return [Sound(samples, self.spectrogram.rate) for samples in media.float().cpu()]

    def file(self, item: Sound, metadata: Mapping[str, str]) -> Encoded:
        """Return a sound as a file of the codec's format that carries the metadata."""
        return sound_file(item, metadata, self.format)

    def _spectrograms(self, latents: Tensor) -> Tensor:
        """Return the spectrograms of latents, in float32."""
        return self.network.decode(latents.to(self.network.mean.dtype)).float()


def turned_down(
    sounds: Float[Tensor, "batch *channels samples"],
) -> Float[Tensor, "batch *channels samples"]:
    """Return waveforms, each as a whole turned down where it would reach beyond -1 and 1."""
    peaks = sounds.abs().flatten(1).amax(dim=1)
    return sounds / peaks.clamp(min=1).view(-1, *[1] * (sounds.ndim - 1))


def spectrogram_pictures(
    log_mel: Float[Tensor, "batch bands frames"],
) -> Float[Tensor, "batch 3 bands frames"]:
    """Return spectrograms as pictures in -1..1, from black over violet and orange to white."""
    loud = (log_mel.flip(1) + 1) / 2
    red = loud.sqrt()
    green = loud.square()
    # Strongest at a third, gone at two thirds, and back where all is white.
    blue = (loud * (2 - 3 * loud) * 2).clamp(min=0) + (3 * loud - 2).clamp(min=0)
    return 2 * torch.stack([red, green, blue], dim=1).clamp(0, 1) - 1


def sound_picture(sound: Sound) -> Image:
    """Return the spectrogram of a sound as a picture: time from left to right, low tones below.

    It has 128 rows, and a column for every 4 ms of a sound of 16 kHz, of a long one about 2,048.
    Several channels are shown as their mean.
    """
    spectrogram = picture_spectrogram(sound.rate, len(sound), _PICTURE_COLUMNS)
    (picture,) = to_images(spectrogram_pictures(spectrogram.log_mel(sound.mixed[None])))
    return picture


def picture_spectrogram(rate: int, num_samples: int, columns: int) -> Spectrogram:
    """Return the spectrogram by which a sound of so many samples is shown.

    Args:
        rate: samples a second.
        num_samples: of the sound.
        columns: about the most that a long sound has.
    """
    octaves = max(0, math.ceil(math.log2(rate / _PICTURE_RATE)))
    hop = max(_PICTURE_HOP, num_samples // columns)
    return Spectrogram(rate=rate, window=_PICTURE_WINDOW * 2**octaves, hop=hop)


def sound_file(sound: Sound, metadata: Mapping[str, str], format: str = "wav") -> Encoded:
    """Return a sound as a file of a format, with the metadata as JSON in its comment.

    Raises AudioError for an unknown format, and for sounds without samples or with values that are
    no numbers or reach beyond -1 and 1.
    """
    if format not in FORMATS:
        raise AudioError(f"there is no format {format!r}; expected {', '.join(FORMATS)}.")
    problem = _unwritable(sound)
    if problem:
        raise AudioError(f"the sound cannot be written: {problem}.")
    subtype, mime = FORMATS[format]
    buffer = BytesIO()
    library = _soundfile()
    with library.SoundFile(
        buffer,
        "w",
        sound.rate,
        channels=sound.num_channels,
        subtype=subtype,
        format=format.upper(),
    ) as file:
        file.comment = json.dumps(dict(metadata), ensure_ascii=True)
        file.write(torch.atleast_2d(sound.samples).T.numpy())
    return Encoded(buffer.getvalue(), f".{format}", mime)


def read_sound(
    path: str | Path, *, rate: int | None = None, mixed: bool = True
) -> tuple[Sound, dict[str, str]]:
    """Read a WAV, FLAC or OGG file: its sound and its metadata.

    Args:
        path: of the file.
        rate: samples a second that it must have; None for any.
        mixed: whether the sound is the mean of all channels; otherwise it has those of the file.

    Raises:
        AudioError: the file cannot be read, is empty, or has another rate.
    """
    library = _soundfile()
    try:
        with library.SoundFile(path) as file:
            samples = torch.from_numpy(file.read(dtype="float32", always_2d=True))
            found = int(file.samplerate)
            comment = _riff_comment(Path(path)) if file.format == "WAV" else str(file.comment)
    except (OSError, library.SoundFileError) as error:
        raise AudioError(
            f"{path} cannot be read as a sound: {reason_of(error)}. Give a WAV, FLAC or OGG file."
        ) from error
    if len(samples) == 0:
        raise AudioError(f"{path} has no samples. Give a sound of some length.")
    if rate is not None and found != rate:
        raise AudioError(
            f"{path} has {found} samples a second; expected {rate}. Convert it first: "
            f"ffmpeg -i {path} -ar {rate} converted.wav."
        )
    if mixed or samples.shape[1] == 1:
        sound = Sound(samples.mean(dim=1), found)
    else:
        sound = Sound(samples.T.contiguous(), found)
    return sound, {key: str(value) for key, value in object_in(comment).items()}


def check_usable(sound: Sound) -> None:
    """Refuse a sound that says nothing: AudioError for one that is silent or clipped.

    Clipped is what stays at its largest value in more than a thousandth of its samples.
    """
    problem = _unwritable(sound)
    if problem:
        raise AudioError(f"the sound cannot be used: {problem}.")
    amplitudes = sound.samples.abs()
    if float(amplitudes.max()) < _SILENCE:
        raise AudioError("the sound cannot be used: it is silent. Record it louder.")
    clipped = float((amplitudes >= _FULL_SCALE).float().mean())
    if clipped > CLIPPED_SHARE:
        raise AudioError(
            f"the sound cannot be used: {100 * clipped:.1f} % of its samples are at the largest "
            "value, so it is clipped. Record it more quietly."
        )


def _unwritable(sound: Sound) -> str | None:
    """Return why a sound has no meaning as a file, None if it has one."""
    if sound.samples.numel() == 0:
        return "it has no samples"
    if sound.samples.ndim > 2 or sound.num_channels > _MOST_CHANNELS:
        return f"its samples are {list(sound.samples.shape)}; expected one channel, or two"
    if not bool(sound.samples.isfinite().all()):
        return "it holds NaN or infinity"
    largest = float(sound.samples.abs().max())
    if largest > 1:
        return f"it reaches {largest:.2f}, beyond -1 and 1; turn it down"
    return None


def _riff_comment(path: Path) -> str:
    """Return the comment of a WAV file, of any length; soundfile leaves out long ones.

    A WAV file is a row of chunks, each with a name and a size, filled up to an even one. The
    comment is the part ICMT of the chunk LIST whose kind is INFO.
    """
    with path.open("rb") as file:
        file.seek(len(b"RIFF....WAVE"))
        while len(head := file.read(8)) == 8:
            name, size = head[:4], int.from_bytes(head[4:], "little")
            if name == b"LIST" and file.read(4) == b"INFO":
                name, size = b"INFO", 0
            if name == b"ICMT":
                return file.read(size).rstrip(b"\0").decode(errors="replace")
            if name == b"LIST":
                size -= 4
            file.seek(size + size % 2, SEEK_CUR)
    return ""


def _soundfile() -> Any:
    """Return the library that reads and writes sounds; AudioError where it is missing."""
    try:
        import soundfile
    except ImportError as error:
        raise AudioError(
            "sounds are read and written by soundfile: pip install 'twostep[media]'."
        ) from error
    return soundfile
