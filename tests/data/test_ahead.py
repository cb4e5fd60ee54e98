"""What is read ahead is what would have been drawn, and randomness goes on as if it had been."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from twostep.data.ahead import ReadAhead
from twostep.networks.conditioning import Conditioning
from twostep.training.loop import Randomness


@dataclass
class Drawn:
    """A source that notes on whose behalf it draws."""

    calls: list[str] = field(default_factory=list)

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        self.calls.append("draw")
        latents = torch.rand(count, 4, 2, 2, generator=tensors) + words.random()
        return latents, Conditioning(
            torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 6)
        )

    def empty(self, like: Conditioning) -> Conditioning:
        return like

    def fingerprint(self) -> str:
        return ""

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        self.calls.append("draw_latents")
        return torch.rand(count, 4, 2, 2, generator=tensors)


def iteration(source: object, number: int) -> tuple[Tensor, Tensor, float]:
    """What an iteration draws: a batch, and then more of the same randomness."""
    at = Randomness.at(0, number)
    latents, _ = source.draw(3, at.tensors, at.words)
    return latents, torch.rand(2, generator=at.tensors), at.words.random()


def expect(ahead: ReadAhead, number: int) -> None:
    at = Randomness.at(0, number)
    ahead.expect(3, at.tensors, at.words)


def test_batches_that_are_read_ahead_are_the_same_and_read_once() -> None:
    source = Drawn()
    ahead = ReadAhead(source)
    for number in range(4):
        found, expected = iteration(ahead, number), iteration(Drawn(), number)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]
        expect(ahead, number + 1)
    ahead.close()
    assert source.calls == ["draw"] * 5


def test_parts_of_one_batch_get_the_same_batch() -> None:
    source = Drawn()
    ahead = ReadAhead(source)
    iteration(ahead, 0)
    expect(ahead, 1)
    first, second = iteration(ahead, 1), iteration(ahead, 1)
    assert torch.equal(first[0], second[0])
    assert source.calls == ["draw"] * 2


def test_what_was_read_in_vain_is_drawn_and_nothing_more_is_read() -> None:
    source = Drawn()
    ahead = ReadAhead(source)
    iteration(ahead, 0)
    expect(ahead, 5)
    assert torch.equal(iteration(ahead, 1)[0], iteration(Drawn(), 1)[0])
    expect(ahead, 2)
    expect(ahead, 3)
    ahead.close()
    assert source.calls == ["draw"] * 3


def test_latents_alone_are_read_ahead_too() -> None:
    source = Drawn()
    ahead = ReadAhead(source)
    ahead.draw_latents(3, Randomness.at(0, 0).tensors)
    expect(ahead, 1)
    found = ahead.draw_latents(3, Randomness.at(0, 1).tensors)
    assert torch.equal(found, Drawn().draw_latents(3, Randomness.at(0, 1).tensors))
    assert source.calls == ["draw_latents"] * 2
