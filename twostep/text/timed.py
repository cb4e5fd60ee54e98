"""Prompts of sounds with how long they last: T5's tokens, and two numbers of seconds.

As `StableAudioPipeline` of diffusers encodes them: T5's vectors are projected, and zero where a
prompt has no more words; where the sound begins and ends in the recording that it is a part of are
two tokens more, and these two alone are what the network is told as a whole (section 2.2 of
arXiv 2407.14358). A sound here always begins at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.text.words import TOKENIZING, forget_lengths


@runtime_checkable
class Tokenizer(Protocol):
    """What makes tokens of prompts."""

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Return the ids of tokens, filled up to one length, and 1 where a token is a prompt's."""


@dataclass(frozen=True)
class FilledTokens:
    """A tokenizer of transformers: prompts are filled up, and cut off, to its own length.

    Args:
        tokenizer: of T5.
    """

    tokenizer: Any

    def to_save(self) -> Any:
        """Return the tokenizer without the lengths of its last call."""
        forget_lengths(self.tokenizer)
        return self.tokenizer

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Return the ids of tokens, and 1 where a token is a prompt's."""
        with TOKENIZING:
            tokens = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, return_tensors="pt"
            )
        return tokens.input_ids, tokens.attention_mask


@dataclass(frozen=True)
class BlankTokens:
    """Stands for a tokenizer where only shapes are wanted.

    Args:
        count: Tokens of every prompt.
    """

    count: int

    def __call__(
        self, prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Return as many tokens as a tokenizer would."""
        shape = (len(prompts), self.count)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class TimedPrompts:
    """T5 with the projections of Stable Audio.

    The empty prompt is all zeros, seconds too, as diffusers guides from it. Prompts have no
    weights, and what is too long is cut off.

    Args:
        tokens: Makes tokens of prompts.
        encoder: A `T5EncoderModel` of transformers.
        projection: A `StableAudioProjectionModel` of diffusers.
        rate: Samples a second; a size is the number of samples by 1.
    """

    tokens: Tokenizer
    encoder: Any
    projection: Any
    rate: int

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by the names that diffusers gives them."""
        return {"text_encoder": self.encoder, "projection_model": self.projection}

    def with_networks(self, networks: Mapping[str, Any]) -> TimedPrompts:
        """Return the same with other networks."""
        return replace(
            self, encoder=networks["text_encoder"], projection=networks["projection_model"]
        )

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch 0"]]:
        """Encode prompts without how long they last; the pooled embeddings are empty."""
        ids, mask = self.tokens(prompts)
        device = self.encoder.device
        mask = mask.to(device)
        hidden = self.encoder(ids.to(device), attention_mask=mask).last_hidden_state
        projected = self.projection(text_hidden_states=hidden).text_hidden_states
        text: Tensor = projected * mask[..., None].to(projected.dtype)
        return text, torch.zeros(len(text), 0, device=text.device, dtype=text.dtype)

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts of sounds of so many samples.

        The pooled embedding is that of both seconds, one behind the other.
        """
        text, _ = self.encode(prompts)
        begin, end = self._seconds(width / self.rate)
        count = len(text)
        tokens = torch.cat([text, begin.expand(count, -1, -1), end.expand(count, -1, -1)], dim=1)
        wanted = torch.tensor([prompt != "" for prompt in prompts], device=tokens.device)
        tokens = torch.where(wanted[:, None, None], tokens, 0.0)
        pooled = torch.cat([begin, end], dim=2)[:, 0].expand(count, -1)
        sizes = image_sizes(count, width, height).to(tokens.device, tokens.dtype)
        return Conditioning(tokens, pooled, sizes)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return none: T5 spells every word."""
        return []

    def _seconds(
        self, seconds: float
    ) -> tuple[Float[Tensor, "1 1 width"], Float[Tensor, "1 1 width"]]:
        """Return the embeddings of where a sound begins and of where it ends."""
        device = self.projection.device
        embedded = self.projection(
            start_seconds=torch.tensor([0.0], device=device),
            end_seconds=torch.tensor([seconds], device=device),
        )
        return embedded.seconds_start_hidden_states, embedded.seconds_end_hidden_states
