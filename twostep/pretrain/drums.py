"""Hits of drums, rendered from a soundfont's kit, with captions: "a snare drum hit, loud"."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twostep.pretrain.notes import LOUDNESSES, VELOCITIES, Naming
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.soundfont import Player, amplified, find_soundfont

DRUMS = {
    "kick": (35, 36),
    "snare": (38, 40),
    "clap": (39,),
    "hi-hat": (42, 44),
    "tom": (41, 43, 45, 47, 48, 50),
    "crash": (49, 57),
    "ride": (51, 59),
    "cowbell": (56,),
}
"""The drums, and the keys of General MIDI's percussion that strike them."""

DRUM_WORDS = ("drum", *DRUMS)
"""What captions of hits name beside the words of notes; every hit is of a drum."""

DRUM_SYNONYMS = {"hit": "drum", "cymbal": "drum", "hihat": "hi-hat", "handclap": "clap"}

_KITS = (0, 8, 16, 24)
"""Kits that have these drums at these keys: the standard one, of a room, for rock, electronic."""

_GAIN = 1.0

HitLabels = UInt8[Tensor, "hits 2"]
"""Of each hit the number of its drum, and 0 if it is soft, 1 if loud."""


def random_hits(count: int, generator: torch.Generator) -> HitLabels:
    """Return labels of random hits."""
    drum = torch.randint(len(DRUMS), (count,), generator=generator)
    loudness = torch.randint(len(LOUDNESSES), (count,), generator=generator)
    return torch.stack([drum, loudness], dim=1).to(torch.uint8)


def render_hits(
    labels: HitLabels,
    seed: int,
    *,
    soundfont: Path | None = None,
    on_sound: OnDone = untold,
) -> Float[Tensor, "hits samples"]:
    """Strike drums; which of a drum's keys in which kit, how hard and when is random.

    Args:
        labels: of the hits.
        seed: of what is random.
        soundfont: the file; that of the system by default.
        on_sound: called with the number of hits that are done, and of all.

    Raises:
        NotesError: there is no soundfont, nothing to play it, or it has no percussion.
    """
    player = Player(soundfont or find_soundfont())
    words = random.Random(seed)
    keys = list(DRUMS.values())
    sounds = []
    for number, (drum, loudness) in enumerate(labels.tolist()):
        player.begin(words.choice(_KITS), drums=True)
        velocity = words.randint(*VELOCITIES[loudness])
        sounds.append(player.strike_all([words.choice(keys[drum])], velocity, words))
        on_sound(number + 1, len(labels))
    return amplified(sounds, _GAIN)


def hit_caption(label: tuple[int, int], words: random.Random, naming: Naming | None = None) -> str:
    """Return a caption of a hit, which may leave something out: "a snare drum hit, loud".

    Args:
        label: numbers of drum and loudness.
        words: the randomness.
        naming: how often what is said, the drum as instruments are; everything if not given.
    """
    drum, loudness = label
    if naming is not None and words.random() < naming.nothing:
        return ""
    naming = naming or Naming(1.0, 1.0, 0.0, 1.0, 0.0)
    text = "a drum hit"
    if words.random() < naming.instrument:
        text = f"a {list(DRUMS)[drum]} drum hit"
    if words.random() < naming.loudness:
        text += f", {LOUDNESSES[loudness]}"
    return text
