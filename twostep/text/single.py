"""The one CLIP text encoder of Stable Diffusion 1.5: prompts -> text embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.text.words import TOKENIZING, words_in_pieces


@dataclass(frozen=True, eq=False)
class SingleTextEncoder:
    """A CLIP text encoder, of which all vectors of the last layer are used, normalised.

    There is no pooled embedding, prompts have no weights, and what is too long is cut off.

    Args:
        tokenizer: Of transformers, or a `ClipWords`.
        encoder: A `LeanClip` without projection.
    """

    tokenizer: Any
    encoder: Any

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoder by the name that diffusers gives it."""
        return {"text_encoder": self.encoder}

    def with_networks(self, networks: Mapping[str, Any]) -> SingleTextEncoder:
        """Return the same with another network."""
        return replace(self, encoder=networks["text_encoder"])

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch 0"]]:
        """Encode prompts; the pooled embeddings are empty."""
        with TOKENIZING:
            tokens = self.tokenizer(
                list(prompts), padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
        output = self.encoder(tokens.to(self.encoder.device), output_hidden_states=True)
        text: Tensor = self.encoder.final_layer_norm(output.hidden_states[-1])
        return text, torch.zeros(len(text), 0, device=text.device, dtype=text.dtype)

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts; the size is no part of what this family is conditioned on."""
        text, pooled = self.encode(prompts)
        sizes = image_sizes(len(text), width, height).to(text.device, text.dtype)
        return Conditioning(text, pooled, sizes)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of the prompt that the vocabulary holds only in pieces, in order."""
        with TOKENIZING:
            return list(words_in_pieces(prompt, self.tokenizer.tokenize))
