"""Reading from the disk ahead: while an accelerator computes, the next batch is read in a thread.

What is read is exactly what would have been drawn: a batch read ahead is handed out only to a
caller whose random numbers are those that it was read with, and leaves them as if it was drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.networks.conditioning import Conditioning

_Read = TypeVar("_Read")


@dataclass(frozen=True)
class _State:
    """Where a generator of tensors and one of words stand."""

    tensors: bytes
    words: object

    @classmethod
    def of(cls, tensors: torch.Generator, words: random.Random | None) -> _State:
        return cls(bytes(tensors.get_state().numpy()), words and words.getstate())


@dataclass(frozen=True, eq=False)
class _Reading:
    """A batch that is being read: of which kind and size, and from where in the random numbers."""

    kind: str
    count: int
    start: _State
    batch: Future[object]
    tensors: torch.Generator
    words: random.Random | None


@runtime_checkable
class Readable(Protocol):
    """What can be read ahead: a `CachedSource`, for one."""

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random items."""

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        """Return random latents."""

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items."""

    def fingerprint(self) -> str:
        """Return a short text that is another one if any item is another."""


class ReadAhead:
    """A source whose next batch is read before it is asked for, if it is known what will be.

    Attributes:
        source: what is read from.
    """

    def __init__(self, source: Readable) -> None:
        """Read nothing yet."""
        self.source = source
        self._kind = ""
        self._reading: _Reading | None = None
        self._was_right = True
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def fingerprint(self) -> str:
        """Return the fingerprint of the source."""
        return self.source.fingerprint()

    def expect(self, count: int, tensors: torch.Generator, words: random.Random) -> None:
        """Begin to read what the next call will draw, if it is of the kind of the last one.

        Where the last batch was read in vain, as where a method keeps batches, no other is.

        Args:
            count: number of items.
            tensors: a generator that stands where that of the next call will; it is used up.
            words: likewise.
        """
        if not self._kind or not self._was_right:
            return
        self._was_right = False
        kind = self._kind
        known = words if kind == "draw" else None
        start = _State.of(tensors, known)
        read: Callable[[], object] = partial(self.source.draw_latents, count, tensors)
        if known is not None:
            read = partial(self.source.draw, count, tensors, known)
        batch = self._thread.submit(read)
        self._reading = _Reading(kind, count, start, batch, tensors, known)

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return what the source draws."""
        draw = partial(self.source.draw, count, tensors, words)
        return self._taken("draw", count, tensors, words, draw)

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        """Return the latents that the source draws."""
        draw = partial(self.source.draw_latents, count, tensors)
        return self._taken("draw_latents", count, tensors, None, draw)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the empty prompt as the source has it."""
        return self.source.empty(like)

    def close(self) -> None:
        """Wait for what is being read, and read nothing more."""
        self._thread.shutdown()

    def _taken(
        self,
        kind: str,
        count: int,
        tensors: torch.Generator,
        words: random.Random | None,
        draw: Callable[[], _Read],
    ) -> _Read:
        """Return the batch that was read ahead if it is the one, or else draw it now."""
        reading = self._reading
        self._kind = kind
        wanted = (kind, count, _State.of(tensors, words))
        if reading is None or (reading.kind, reading.count, reading.start) != wanted:
            return draw()
        batch: _Read = reading.batch.result()  # type: ignore[assignment]
        self._was_right = True
        # It stays for further parts of the same batch, which draw the same again.
        tensors.set_state(reading.tensors.get_state())
        if words is not None and reading.words is not None:
            words.setstate(reading.words.getstate())
        return batch
