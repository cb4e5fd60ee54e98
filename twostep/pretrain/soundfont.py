"""Sounds played from a soundfont: instruments, several notes at once, and drums.

The soundfont is that of General MIDI in Debian's package fluid-soundfont-gm (MIT); tinysoundfont
plays it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.errors import TwostepError

RATE = 16_000
NUM_SAMPLES = 16_384
"""Samples of a note: a little more than a second."""

SOUNDFONTS = (
    Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"),
    Path("/usr/share/soundfonts/FluidR3_GM.sf2"),
)
"""Where Linux distributions put it."""

_OVERSAMPLING = 3
"""Notes are played at so many times the rate, and then lose what lies above half of it."""

_LATEST_START = 0.06
_ENDS = (0.55, 0.95)
"""Seconds at which notes begin at the latest, and when they are let go at the earliest and
latest."""

_SPARE = 0.01
"""Seconds that are played beyond the end, for the parts of a note are rounded."""

GAIN = 1.4
"""With which the loudest notes nearly reach 1."""


class NotesError(TwostepError):
    """Notes that cannot be rendered or read."""


class Player:
    """A soundfont, played at the higher rate."""

    def __init__(self, path: Path) -> None:
        """Load the soundfont; NotesError if it cannot be read, or nothing plays it."""
        try:
            import tinysoundfont
        except ImportError as error:
            raise NotesError(
                "notes are rendered by tinysoundfont: pip install --no-deps tinysoundfont (what "
                "it depends on is for loudspeakers)."
            ) from error
        self._path = path
        self._synthesiser = tinysoundfont.Synth(samplerate=RATE * _OVERSAMPLING)
        try:
            self._font = int(self._synthesiser.sfload(str(path)))
        except (OSError, RuntimeError) as error:
            raise NotesError(f"{path} cannot be read as a soundfont ({error}).") from error

    def begin(self, program: int, *, drums: bool = False) -> None:
        """Silence what sounds and take a program, or with `drums` a drum kit.

        Raises NotesError if the soundfont does not have it.
        """
        self._synthesiser.sounds_off()
        try:
            self._synthesiser.program_select(0, self._font, 0, program, drums)
        except RuntimeError as error:
            raise NotesError(
                f"{self._path} has no program {program}. Give a General MIDI soundfont."
            ) from error

    def strike(self, pitch: int, velocity: int) -> None:
        """Begin a note."""
        self._synthesiser.noteon(0, pitch, velocity)

    def release(self, pitch: int) -> None:
        """Let a note go."""
        self._synthesiser.noteoff(0, pitch)

    def strike_all(
        self, pitches: Sequence[int], velocity: int, words: random.Random
    ) -> Float[Tensor, " samples"]:
        """Return a sound of `NUM_SAMPLES` in which notes are struck together and then let go.

        Args:
            pitches: MIDI numbers; of a drum kit they are its drums.
            velocity: how hard they are struck, of 127.
            words: draws when they are struck and let go.
        """
        start = words.uniform(0, _LATEST_START)
        end = words.uniform(*_ENDS)
        pieces = [self.play(start)]
        for pitch in pitches:
            self.strike(pitch, velocity)
        pieces.append(self.play(end - start))
        for pitch in pitches:
            self.release(pitch)
        pieces.append(self.play(NUM_SAMPLES / RATE - end + _SPARE))
        return _at_rate(torch.cat(pieces))

    def play(self, seconds: float) -> Tensor:
        """Return what sounds in the next seconds, the mean of both channels."""
        count = round(seconds * RATE * _OVERSAMPLING)
        stereo = torch.frombuffer(bytearray(self._synthesiser.generate(count)), dtype=torch.float32)
        return stereo.view(-1, 2).mean(dim=1)


def _at_rate(sound: Tensor) -> Tensor:
    """Return a sound at the lower rate, without the frequencies that this cannot hold."""
    spectrum = torch.fft.rfft(sound[: NUM_SAMPLES * _OVERSAMPLING])
    lower: Tensor = torch.fft.irfft(spectrum[: NUM_SAMPLES // 2 + 1], n=NUM_SAMPLES)
    return lower / _OVERSAMPLING


def amplified(sounds: list[Tensor], gain: float = GAIN) -> Float[Tensor, "sounds samples"]:
    """Return sounds together, made louder by a gain, but none beyond -1 and 1."""
    louder = gain * torch.stack(sounds)
    return louder / louder.abs().amax(dim=1, keepdim=True).clamp(min=1)


def find_soundfont() -> Path:
    """Return the soundfont of the system; NotesError says how to install it where there is none."""
    for path in SOUNDFONTS:
        if path.is_file():
            return path
    raise NotesError(
        f"there is no soundfont at {SOUNDFONTS[0]}. Install it (apt-get install "
        "fluid-soundfont-gm), or name another General MIDI soundfont with `soundfont`."
    )
