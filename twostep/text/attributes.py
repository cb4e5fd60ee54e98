"""Prompts over a closed vocabulary as the attributes that they name.

A prompt becomes one number for each word of the vocabulary, 1 where it is named. There is no
network: what the words mean is learned by the backbone, whose first layer embeds these numbers. The
order of words is lost, which is no loss where no two of them are of the same kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twostep.networks.conditioning import Conditioning, image_sizes

FILLERS = frozenset(
    {"a", "an", "at", "in", "of", "on", "the", "note", "sound", "with", "and", "very"}
)
"""Words that say nothing here, and are not warned of."""

_PITCH = re.compile(r"\b([a-g])(#|s|b|-?sharp|-?flat)?\s?(\d)(?!\w)")
"""A pitch as musicians write it: C4, F#3, Bb5, e-flat4."""

_SHARPS = ("c", "c#", "d", "d#", "e", "f", "f#", "g", "g#", "a", "a#", "b")
"""The pitch classes from C up; the flats are these by another name."""


@dataclass(frozen=True)
class AttributePrompts:
    """Makes conditioning of prompts.

    Args:
        vocabulary: The words that a prompt may name; a pitch is two of them (`pitch_words`).
        synonyms: Other words for some of them.
    """

    vocabulary: tuple[str, ...]
    synonyms: Mapping[str, str] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """There are none."""
        return {}

    def with_networks(self, networks: Mapping[str, Any]) -> AttributePrompts:
        """Return the same."""
        return self

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "prompts 1 0"], Float[Tensor, "prompts words"]]:
        """Return no embeddings of tokens, and which words each prompt names."""
        pooled = torch.zeros(len(prompts), len(self.vocabulary))
        for row, prompt in enumerate(prompts):
            known = [self._places[word] for word in self._words(prompt) if word in self._places]
            pooled[row, known] = 1
        return torch.zeros(len(prompts), 1, 0), pooled

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Return what the network is given for prompts, whatever the size; none is ever cut off."""
        text, pooled = self.encode(prompts)
        return Conditioning(text, pooled, image_sizes(len(prompts), width, height))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are not in the vocabulary."""
        known = self._places.keys() | FILLERS
        return [word for word in self._words(prompt) if word not in known]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.vocabulary)}

    def _words(self, prompt: str) -> list[str]:
        """Return the words of a prompt; synonyms are replaced, and a pitch is two words."""
        text = _PITCH.sub(lambda match: " ".join(pitch_words(_midi(match))), prompt.lower())
        words = re.findall(r"[\w#-]+", text)
        return [self.synonyms.get(word, word) for word in words]


def pitch_words(midi: int) -> tuple[str, str]:
    """Return the two words for a MIDI number: 69, which is A4, is ("key-a", "octave-4")."""
    octave, place = divmod(midi, len(_SHARPS))
    return f"key-{_SHARPS[place]}", f"octave-{octave - 1}"


def pitch_name(midi: int) -> str:
    """Return the name of a MIDI number: 69 is A4."""
    octave, place = divmod(midi, len(_SHARPS))
    return f"{_SHARPS[place].upper()}{octave - 1}"


def _midi(match: re.Match[str]) -> int:
    """Return the MIDI number of a pitch: C4 is 60."""
    place = _SHARPS.index(match[1])
    sign = (match[2] or "").removeprefix("-")
    if sign in ("#", "s", "sharp"):
        place += 1
    elif sign:
        place -= 1
    return len(_SHARPS) * (int(match[3]) + 1) + place
