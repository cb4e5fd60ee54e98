"""What the trainer draws from, for the built-in drawings: cached latents, captioned anew at every draw."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from twostep.data.latents import LatentCache
from twostep.models.conditioning import Conditioning
from twostep.models.text import TextEncoders


@dataclass(frozen=True, eq=False)
class EmojiSource:
    """The emoji set's latents, all of one size in pixels, with captions that are written and encoded at every draw."""

    latents: LatentCache
    text: TextEncoders
    width: int
    height: int

    @torch.no_grad()
    def draw(self, count: int, tensors: torch.Generator, words: random.Random) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of captions that often say less than there is."""
        x0, captions = self.latents.draw(count, tensors, words)
        return x0, self.text.conditioning(captions, self.width, self.height)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt, repeated."""
        return self._empty.expand(len(like))

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            return self.text.conditioning([""], self.width, self.height)
