"""Notes, chords and drum hits together: what a model of all of them learns from.

Each kind has labels, a function that renders them and one that captions them. A third of what is
rendered is of each. Chords share the words of notes for instruments, roots and loudness.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float16, UInt8
from safetensors.torch import load_file, save
from torch import Tensor

from twostep.files import write_atomically
from twostep.media.codec import Codec
from twostep.models.bundle import Bundle
from twostep.pretrain.chords import (
    CHORD_WORDS,
    KEYS,
    chord_caption,
    random_chords,
    render_chords,
)
from twostep.pretrain.drums import (
    DRUM_SYNONYMS,
    DRUM_WORDS,
    hit_caption,
    random_hits,
    render_hits,
)
from twostep.pretrain.kept import made_once, refusing_damage
from twostep.pretrain.latents import LatentSource
from twostep.pretrain.notes import (
    SYNONYMS,
    Naming,
    caption,
    encoded,
    note_words,
    random_labels,
    render_notes,
    sound_source,
)
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.soundfont import NotesError
from twostep.text.attributes import AttributePrompts
from twostep.training.loop import Randomness

_MOST_COLUMNS = 4
"""The longest labels, those of chords; shorter ones are filled up with zeros."""


@runtime_checkable
class _Renders(Protocol):
    def __call__(self, labels: Tensor, seed: int, *, soundfont: Path | None) -> Tensor:
        """Return waveforms of labels."""


@dataclass(frozen=True)
class SoundKind:
    """A kind of sounds.

    Args:
        columns: numbers of a label.
        draw: returns random labels, so many.
        render: returns their waveforms.
        caption: returns a caption of one label, which may leave something out.
    """

    columns: int
    draw: Callable[[int, torch.Generator], Tensor]
    render: _Renders
    caption: Callable[[Any, random.Random, Naming | None], str]


KINDS = {
    "notes": SoundKind(3, random_labels, render_notes, caption),
    "chords": SoundKind(4, random_chords, render_chords, chord_caption),
    "hits": SoundKind(2, random_hits, render_hits, hit_caption),
}
"""All kinds of sounds; a cache counts them in this order."""


def all_prompts() -> AttributePrompts:
    """Return what makes conditioning of captions of all kinds."""
    words = (*note_words(), *CHORD_WORDS, *DRUM_WORDS)
    return AttributePrompts(words, {**SYNONYMS, **KEYS, **DRUM_SYNONYMS})


@dataclass(frozen=True, eq=False)
class Sounds:
    """Sounds of all kinds, what they are, and how often captions say what.

    Args:
        latents: in half precision.
        kinds: the number of each one's kind in `KINDS`.
        labels: what each one is, filled up with zeros.
        naming: how often captions leave something out.
    """

    latents: Float16[Tensor, "sounds components blocks"]
    kinds: UInt8[Tensor, " sounds"]
    labels: UInt8[Tensor, "sounds 4"]
    naming: Naming = field(default_factory=Naming)

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Float[Tensor, "count components blocks"], list[str]]:
        """Return random latents with captions, which often say less than there is."""
        rows = torch.randint(len(self.latents), (count,), generator=tensors)
        captions = [self.caption(row, words) for row in rows.tolist()]
        return self.latents[rows].float(), captions

    def caption(self, row: int, words: random.Random) -> str:
        """Return a caption of one sound, which often says less than there is."""
        kind = list(KINDS.values())[int(self.kinds[row])]
        label = tuple(self.labels[row, : kind.columns].tolist())
        return kind.caption(label, words, self.naming)

    def save(self, path: Path) -> None:
        """Write the sounds to a safetensors file; `load_sounds` reads it."""
        tensors = {"latents": self.latents, "kinds": self.kinds, "labels": self.labels}
        with write_atomically(path) as file:
            file.write(save(tensors))


def load_sounds(path: Path) -> Sounds:
    """Read cached sounds; NotesError if they are missing or damaged."""
    with refusing_damage(path, NotesError, "holds no sounds", "they are rendered again"):
        tensors = load_file(path)
        latents, kinds, labels = (tensors[name] for name in ("latents", "kinds", "labels"))
    is_whole = len(latents) == len(kinds) == len(labels)
    if not is_whole or not bool(latents.isfinite().all()) or int(kinds.max()) >= len(KINDS):
        raise NotesError(f"{path} is damaged. Delete it; its sounds are rendered again.")
    return Sounds(latents, kinds, labels)


def render_all(
    count: int,
    seed: int,
    *,
    soundfont: Path | None = None,
    on_sound: OnDone = untold,
) -> tuple[Float[Tensor, "sounds samples"], UInt8[Tensor, " sounds"], UInt8[Tensor, "sounds 4"]]:
    """Render random sounds, of each kind as many.

    Args:
        count: of all sounds, rounded down to a multiple of the kinds.
        seed: of what is random.
        soundfont: the file; that of the system by default.
        on_sound: called after each kind.

    Returns:
        The waveforms, the number of each one's kind, and their labels.

    Raises:
        NotesError: there is no soundfont, or nothing to play it.
    """
    per_kind = max(1, count // len(KINDS))
    sounds, kinds, labels = [], [], []
    for number, kind in enumerate(KINDS.values()):
        of_kind = kind.draw(per_kind, Randomness.at(seed, number).tensors)
        sounds.append(kind.render(of_kind, seed + number, soundfont=soundfont))
        kinds.append(torch.full((per_kind,), number, dtype=torch.uint8))
        filled = torch.zeros(per_kind, _MOST_COLUMNS, dtype=torch.uint8)
        filled[:, : kind.columns] = of_kind
        labels.append(filled)
        on_sound((number + 1) * per_kind, len(KINDS) * per_kind)
    return torch.cat(sounds), torch.cat(kinds), torch.cat(labels)


def find_sounds(
    path: Path,
    codec: Codec,
    *,
    count: int,
    soundfont: Path | None,
    on_sound: OnDone,
    seed: int = 0,
) -> Sounds:
    """Read cached sounds, after the first process has made them there if they are missing.

    Args:
        path: of the cache.
        codec: encodes them.
        count: of all sounds.
        soundfont: the file; that of the system by default.
        on_sound: called with the number of sounds that are done, and of all.
        seed: of what is random.
    """

    def make() -> Sounds:
        sounds, kinds, labels = render_all(count, seed, soundfont=soundfont, on_sound=on_sound)
        return Sounds(encoded(sounds, codec), kinds, labels)

    return made_once(path, make, load_sounds)


def rendered(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    sounds: str = "",
    count: int = 6000,
    soundfont: str = "",
) -> LatentSource:
    """Return sounds as latents: a recipe's `data = "twostep.pretrain.sound_kinds:rendered"`.

    They are made in the run's folder at the first time, and read from there afterwards.

    Args:
        teacher: whose codec and prompt encoder are used.
        out: the run's folder.
        advance: called with what is done, of how many, and a word on it.
        sounds: a file of the teacher's training, `sounds.safetensors`, which is read instead.
        count: sounds that are rendered.
        soundfont: the file; that of the system by default.
    """
    if sounds:
        return sound_source(load_sounds(Path(sounds)), teacher.text)
    cache = find_sounds(
        out / "sounds.safetensors",
        teacher.codec,
        count=count,
        soundfont=Path(soundfont) if soundfont else None,
        on_sound=lambda done, total: advance(done, total, "sounds"),
    )
    return sound_source(cache, teacher.text)
