"""The one text encoder of Stable Diffusion 1.5: its tokenizer is used by one thread at a time."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from twostep.text.single import SingleTextEncoder
from twostep.text.words import WordIds


@dataclass
class OverlapsCounted:
    """A tokenizer that knows how many threads were in it at once."""

    most: int = 0
    _inside: int = 0
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, prompts: list[str], **settings: Any) -> WordIds:
        self._enter()
        return WordIds(torch.zeros(len(prompts), 4, dtype=torch.int64))

    def tokenize(self, word: str) -> list[str]:
        self._enter()
        return [word]

    def _enter(self) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        # Long enough for the other threads to come in.
        time.sleep(0.02)
        with self._lock:
            self._inside -= 1


class Encoder(nn.Module):
    device = torch.device("cpu")
    final_layer_norm = nn.Identity()

    def forward(self, tokens: torch.Tensor, *, output_hidden_states: bool) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[tokens[..., None].float()])


def test_threads_use_the_tokenizer_one_after_the_other() -> None:
    tokenizer = OverlapsCounted()
    text = SingleTextEncoder(tokenizer, Encoder())
    with ThreadPoolExecutor(6) as pool:
        encoded = [pool.submit(text.encode, ["a fox"]) for _ in range(3)]
        words = [pool.submit(text.unknown_words, "a fox") for _ in range(3)]
        assert all(each.result()[0].shape == (1, 4, 1) for each in encoded)
        assert all(each.result() == [] for each in words)
    assert tokenizer.most == 1
