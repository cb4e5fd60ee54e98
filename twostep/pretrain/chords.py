"""Chords, rendered from a soundfont, with captions: "a c major chord on a piano, soft".

A chord has an instrument, a root, a kind and a loudness; all its notes are struck together. Every
twelfth combination of instrument, root and kind is held out: training never hears it.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from twostep.pretrain.notes import INSTRUMENTS, LOUDNESSES, LOWEST_PITCH, VELOCITIES, Naming
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.soundfont import Player, amplified, find_soundfont
from twostep.text.attributes import pitch_name, pitch_words

CHORDS = {
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "diminished": (0, 3, 6),
    "seventh": (0, 4, 7, 10),
}
"""The kinds of chords, and semitones of their notes above the root."""

CHORD_INSTRUMENTS = ("piano", "guitar", "marimba")
"""The instruments of notes on which one person plays several at once."""

NUM_ROOTS = 24
"""Roots are those of two octaves, from C3 up."""

CHORD_WORDS = ("chord", *CHORDS)
"""What captions of chords name beside the words of notes."""

_CLASSES = 12
_GAIN = 0.8
"""With which the loudest chords nearly reach 1."""

KEYS = {
    name: pitch_words(midi)[0]
    for midi, names in {
        60: ("c",),
        61: ("c#", "c-sharp", "db", "d-flat"),
        62: ("d",),
        63: ("d#", "d-sharp", "eb", "e-flat"),
        64: ("e",),
        65: ("f",),
        66: ("f#", "f-sharp", "gb", "g-flat"),
        67: ("g",),
        68: ("g#", "g-sharp", "ab", "a-flat"),
        69: ("a-natural",),
        70: ("a#", "a-sharp", "bb", "b-flat"),
        71: ("b",),
    }.items()
    for name in names
}
"""Roots as words of the vocabulary. "a" alone is the article, so that A is called a-natural, or by
its octave, as A3.
"""

ChordLabels = UInt8[Tensor, "chords 4"]
"""Of each chord the number of its instrument among those of notes, the MIDI number of its root, the
number of its kind, and 0 if it is soft, 1 if loud.
"""


def pitch_classes(root: int, kind: int) -> frozenset[int]:
    """Return the pitch classes of a chord, C being 0.

    Args:
        root: its MIDI number.
        kind: the number of the kind.
    """
    steps = list(CHORDS.values())[kind]
    return frozenset((root + step) % _CLASSES for step in steps)


def is_held_out_chord(labels: Integer[Tensor, "chords 4"]) -> Tensor:
    """Tell of every chord whether its instrument, root and kind are held out together."""
    instrument, root, kind, _ = labels.long().unbind(dim=1)
    # Of every instrument and kind one pitch class in each octave, and never the same.
    return (5 * instrument + 3 * kind + 7 * (root // _CLASSES) + root) % _CLASSES == 0


def random_chords(count: int, generator: torch.Generator, *, held_out: bool = False) -> ChordLabels:
    """Return labels of random chords, all held out or none."""
    numbers = torch.tensor([list(INSTRUMENTS).index(name) for name in CHORD_INSTRUMENTS])
    labels = torch.zeros(0, 4, dtype=torch.uint8)
    while len(labels) < count:
        instrument = numbers[torch.randint(len(numbers), (count,), generator=generator)]
        root = LOWEST_PITCH + torch.randint(NUM_ROOTS, (count,), generator=generator)
        kind = torch.randint(len(CHORDS), (count,), generator=generator)
        loudness = torch.randint(len(LOUDNESSES), (count,), generator=generator)
        drawn = torch.stack([instrument, root, kind, loudness], dim=1)
        kept = drawn[is_held_out_chord(drawn) == held_out]
        labels = torch.cat([labels, kept.to(torch.uint8)])
    return labels[:count]


def render_chords(
    labels: ChordLabels,
    seed: int,
    *,
    soundfont: Path | None = None,
    on_sound: OnDone = untold,
) -> Float[Tensor, "chords samples"]:
    """Play chords; which of an instrument's programs plays, how hard and how long is random.

    Args:
        labels: of the chords.
        seed: of what is random.
        soundfont: the file; that of the system by default.
        on_sound: called with the number of chords that are done, and of all.

    Raises:
        NotesError: there is no soundfont, or nothing to play it.
    """
    player = Player(soundfont or find_soundfont())
    words = random.Random(seed)
    programs = list(INSTRUMENTS.values())
    steps_of = list(CHORDS.values())
    sounds = []
    for number, (instrument, root, kind, loudness) in enumerate(labels.tolist()):
        player.begin(words.choice(programs[instrument]))
        velocity = words.randint(*VELOCITIES[loudness])
        pitches = [root + step for step in steps_of[kind]]
        sounds.append(player.strike_all(pitches, velocity, words))
        on_sound(number + 1, len(labels))
    return amplified(sounds, _GAIN)


def chord_caption(
    label: tuple[int, int, int, int], words: random.Random, naming: Naming | None = None
) -> str:
    """Return a caption of a chord, which may leave something out: "a c major chord on a piano".

    Args:
        label: numbers of instrument, root, kind and loudness.
        words: the randomness.
        naming: how often what is said; everything is, with the octave of the root, if not given.
            The kind is said wherever the root is.
    """
    instrument, root, kind, loudness = label
    if naming is not None and words.random() < naming.nothing:
        return ""
    naming = naming or Naming(1.0, 1.0, 0.0, 1.0, 0.0)
    place = words.random()
    name = ""
    if place < naming.pitch:
        name = f"{pitch_name(root)} {list(CHORDS)[kind]} "
    elif place < naming.pitch + naming.register:
        key = pitch_words(root)[0]
        name = f"{words.choice([name for name in KEYS if KEYS[name] == key])} "
        name += f"{list(CHORDS)[kind]} "
    text = f"a {name}chord"
    if words.random() < naming.instrument:
        text += f" on a {list(INSTRUMENTS)[instrument]}"
    if words.random() < naming.loudness:
        text += f", {LOUDNESSES[loudness]}"
    return text
