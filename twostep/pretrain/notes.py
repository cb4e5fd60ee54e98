"""Notes of instruments, rendered from a soundfont, with captions: what models of sounds learn from.

A note has an instrument, a pitch and a loudness, and when it begins and ends is random. Every
twelfth combination of instrument and pitch is held out: training never hears it. What plays them is
in `pretrain.soundfont`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Integer, UInt8
from safetensors.torch import load_file, save
from torch import Tensor

from twostep.files import write_atomically
from twostep.media.audio import AudioCodec
from twostep.media.codec import Codec
from twostep.models.bundle import Bundle, PromptEncoder
from twostep.pretrain.kept import made_once, refusing_damage
from twostep.pretrain.latents import KeptLatents, LatentSource
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.soundfont import NUM_SAMPLES, NotesError, Player, amplified, find_soundfont
from twostep.text.attributes import AttributePrompts, pitch_name, pitch_words
from twostep.training.loop import Randomness

INSTRUMENTS = {
    "piano": (0, 1),
    "guitar": (24, 25),
    "violin": (40,),
    "cello": (42,),
    "trumpet": (56,),
    "saxophone": (65, 66),
    "clarinet": (71,),
    "flute": (73,),
    "oboe": (68,),
    "marimba": (12,),
}
"""The instruments, and the programs of General MIDI, counted from 0, that play them."""

REGISTERS = ("low", "middle", "high")
"""Of the three octaves from C3, C4 and C5."""

LOUDNESSES = ("soft", "loud")

VELOCITIES = ((35, 60), (95, 120))
"""How hard soft and loud notes are struck, of 127."""

LOWEST_PITCH = 48
"""C3 as a MIDI number."""

NUM_PITCHES = 36

SYNONYMS = {
    "quiet": "soft",
    "quietly": "soft",
    "softly": "soft",
    "loudly": "loud",
    "sax": "saxophone",
    "deep": "low",
    "mid": "middle",
}

Labels = UInt8[Tensor, "notes 3"]
"""Of each note the number of its instrument, its MIDI number, and 0 if it is soft, 1 if loud."""


def note_words() -> tuple[str, ...]:
    """Return the words that captions of notes may name."""
    pitches = [pitch_words(LOWEST_PITCH + number) for number in range(NUM_PITCHES)]
    words = [*INSTRUMENTS, *REGISTERS, *LOUDNESSES]
    for kind in (0, 1):
        words += dict.fromkeys(pitch[kind] for pitch in pitches)
    return tuple(words)


def note_prompts() -> AttributePrompts:
    """Return what makes conditioning of captions of notes."""
    return AttributePrompts(note_words(), SYNONYMS)


def is_held_out(labels: Integer[Tensor, "notes 3"]) -> Tensor:
    """Tell of every note whether its instrument and pitch are a combination that is held out."""
    numbers = labels.long()
    # Of every instrument one pitch class in each octave, and never the same.
    return (5 * numbers[:, 0] + 7 * (numbers[:, 1] // 12) + numbers[:, 1]) % 12 == 0


def random_labels(count: int, generator: torch.Generator, *, held_out: bool = False) -> Labels:
    """Return labels of random notes, all held out or none."""
    labels = torch.zeros(0, 3, dtype=torch.uint8)
    while len(labels) < count:
        instrument = torch.randint(len(INSTRUMENTS), (count,), generator=generator)
        pitch = LOWEST_PITCH + torch.randint(NUM_PITCHES, (count,), generator=generator)
        loudness = torch.randint(len(LOUDNESSES), (count,), generator=generator)
        drawn = torch.stack([instrument, pitch, loudness], dim=1)
        kept = drawn[is_held_out(drawn) == held_out]
        labels = torch.cat([labels, kept.to(torch.uint8)])
    return labels[:count]


def render_notes(
    labels: Labels,
    seed: int,
    *,
    soundfont: Path | None = None,
    on_sound: OnDone = untold,
) -> Float[Tensor, "notes samples"]:
    """Play notes; which of an instrument's programs plays, how hard and how long is random.

    Args:
        labels: of the notes.
        seed: of what is random.
        soundfont: the file; that of the system by default.
        on_sound: called with the number of notes that are done, and of all.

    Raises:
        NotesError: there is no soundfont, or nothing to play it.
    """
    player = Player(soundfont or find_soundfont())
    words = random.Random(seed)
    programs = list(INSTRUMENTS.values())
    sounds = []
    for number, (instrument, pitch, loudness) in enumerate(labels.tolist()):
        player.begin(words.choice(programs[instrument]))
        velocity = words.randint(*VELOCITIES[loudness])
        sounds.append(player.strike_all([pitch], velocity, words))
        on_sound(number + 1, len(labels))
    return amplified(sounds)


@dataclass(frozen=True)
class Naming:
    """How often a caption leaves something out, so that a prompt may do so too.

    Attributes:
        instrument: share of captions that say the instrument.
        pitch: share that say the pitch by its name, as C4.
        register: share that say low, middle or high instead.
        loudness: share that say soft or loud.
        nothing: share that say nothing at all, for guidance.
    """

    instrument: float = 0.95
    pitch: float = 0.5
    register: float = 0.3
    loudness: float = 0.6
    nothing: float = 0.1


def caption(label: tuple[int, int, int], words: random.Random, naming: Naming | None = None) -> str:
    """Return a caption of a note, which may leave something out: "a low piano note, soft".

    Args:
        label: numbers of instrument, pitch and loudness.
        words: the randomness.
        naming: how often what is said; everything is, with the pitch by its name, if not given.
    """
    instrument, pitch, loudness = label
    if naming is not None and words.random() < naming.nothing:
        return ""
    naming = naming or Naming(1.0, 1.0, 0.0, 1.0, 0.0)
    place = words.random()
    name = ""
    adjectives = []
    if place < naming.pitch:
        name = pitch_name(pitch)
    elif place < naming.pitch + naming.register:
        adjectives.append(REGISTERS[(pitch - LOWEST_PITCH) // 12])
    if words.random() < naming.instrument:
        adjectives.append(list(INSTRUMENTS)[instrument])
    said_loudness = LOUDNESSES[loudness] if words.random() < naming.loudness else ""
    if said_loudness and words.random() < 0.5:
        adjectives.insert(0, said_loudness)
        said_loudness = ""
    text = f"a {' '.join([*adjectives, 'note'])}"
    return ", ".join(part for part in (text, name, said_loudness) if part)


@dataclass(frozen=True, eq=False)
class NoteCache:
    """Latents of notes and what they are.

    Attributes:
        latents: in half precision.
        labels: of the same notes.
        naming: how often captions say what.
    """

    latents: Float16[Tensor, "notes components blocks"]
    labels: Labels
    naming: Naming = Naming()

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Float[Tensor, "count components blocks"], list[str]]:
        """Return random latents with captions, which often say less than there is."""
        rows = torch.randint(len(self.latents), (count,), generator=tensors)
        labels = self.labels[rows].tolist()
        captions = [caption(tuple(label), words, self.naming) for label in labels]
        return self.latents[rows].float(), captions

    def save(self, path: Path) -> None:
        """Write the notes to a safetensors file; `load_notes` reads it."""
        with write_atomically(path) as file:
            file.write(save({"latents": self.latents, "labels": self.labels}))


def load_notes(path: Path) -> NoteCache:
    """Read cached notes; NotesError if they are missing or damaged."""
    with refusing_damage(path, NotesError, "holds no notes", "they are rendered again"):
        tensors = load_file(path)
        latents, labels = tensors["latents"], tensors["labels"]
    if len(latents) != len(labels) or not bool(latents.isfinite().all()):
        raise NotesError(f"{path} is damaged. Delete it; its notes are rendered again.")
    return NoteCache(latents, labels)


def sound_source(sounds: KeptLatents, text: PromptEncoder) -> LatentSource:
    """Return sounds for distillation and training, with the conditioning of their captions."""
    return LatentSource(sounds, text, NUM_SAMPLES, 1)


def rendered(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    notes: str = "",
    count: int = 6000,
    soundfont: str = "",
) -> LatentSource:
    """Return notes as the teacher's latents: a recipe's `data = "twostep.pretrain.notes:rendered"`.

    They are made in the run's folder at the first time, and read from there afterwards.

    Args:
        teacher: whose codec and prompt encoder are used.
        out: the run's folder.
        advance: called with what is done, of how many, and a word on it.
        notes: a file of the teacher's training, `notes.safetensors`, which is read instead.
        count: notes that are rendered.
        soundfont: the file; that of the system by default.
    """
    if notes:
        return sound_source(load_notes(Path(notes)), teacher.text)
    cache = find_notes(
        out / "notes.safetensors",
        teacher.codec,
        count=count,
        soundfont=Path(soundfont) if soundfont else None,
        on_sound=lambda done, total: advance(done, total, "notes"),
    )
    return sound_source(cache, teacher.text)


def find_notes(
    path: Path,
    codec: Codec,
    *,
    count: int,
    soundfont: Path | None,
    on_sound: OnDone,
    seed: int = 0,
) -> NoteCache:
    """Read cached notes, after the first process has made them there if they are missing.

    Args:
        path: of the cache.
        codec: encodes them.
        count: notes.
        soundfont: the file; that of the system by default.
        on_sound: called with the number of notes that are done, and of all.
        seed: of what is random.
    """

    def make() -> NoteCache:
        labels = random_labels(count, Randomness.at(seed, 0).tensors)
        sounds = render_notes(labels, seed, soundfont=soundfont, on_sound=on_sound)
        return NoteCache(encoded(sounds, codec), labels)

    return made_once(path, make, load_notes)


def encoded(sounds: Tensor, codec: Codec) -> Float16[Tensor, "notes components blocks"]:
    """Return the latents of sounds in half precision."""
    return torch.cat([codec.encode(part).half() for part in sounds.split(128)])


def fitted_codec(codec: AudioCodec, sounds: Tensor) -> AudioCodec:
    """Fit a codec's components to sounds, in place, and return it."""
    codec.network.fit(torch.cat([codec.spectrogram.log_mel(part) for part in sounds.split(128)]))
    return codec
