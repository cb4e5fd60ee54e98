"""SDXL's two CLIP text encoders as one: prompts -> text embeddings and pooled embeddings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging

from twostep.errors import TwostepError
from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.text.prompt_weights import has_weights, in_compel_syntax, without_weights

Embeddings = tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch pooled"]]
"""Text embeddings and pooled embeddings."""

_TOKENIZING = RLock()
"""Tokenizers keep settings between calls, so one thread at a time uses them."""


class PromptError(TwostepError):
    """Weights in a prompt that cannot be read."""


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Two CLIP text encoders.

    Text embeddings are the penultimate layers of both, side by side; the pooled embedding is the
    projection of the second (section 2.1 of arXiv 2307.01952).

    Args:
        tokenizers: One for each encoder.
        encoders: The networks.
        zeros_for_empty: Whether the empty prompt is all zeros, as SDXL was trained, instead of
            what the encoders make of it.
    """

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    zeros_for_empty: bool = False

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders by the names that diffusers gives them."""
        first, second = self.encoders
        return {"text_encoder": first, "text_encoder_2": second}

    def with_networks(self, networks: Mapping[str, Any]) -> "TextEncoders":
        """Return these text encoders with other networks in the place of their own."""
        return replace(self, encoders=(networks["text_encoder"], networks["text_encoder_2"]))

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Encode prompts; what is longer than the tokenizer's limit is cut off there."""
        layers = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            with _TOKENIZING:
                tokens = tokenizer(
                    list(prompts), padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids
            output = encoder(tokens.to(encoder.device), output_hidden_states=True)
            layers.append(output.hidden_states[-2])
        text = torch.cat(layers, dim=-1)
        pooled = output[0]
        if self.zeros_for_empty:
            is_text = torch.tensor([prompt != "" for prompt in prompts], device=text.device)
            text = text * is_text[:, None, None]
            pooled = pooled * is_text[:, None]
        return text, pooled

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels.

        With `whole`, weights count and long prompts are not cut off, as `encode_whole` does it.
        """
        text, pooled = self.encode_whole(prompts) if whole else self.encode(prompts)
        sizes = image_sizes(len(text), width, height).to(text.device, text.dtype)
        return Conditioning(text, pooled, sizes)

    def encode_whole(self, prompts: Sequence[str]) -> Embeddings:
        """Encode prompts with their weights, and all that lies beyond the tokenizer's limit.

        A long prompt is encoded in chunks of the tokenizer's length, and the others are filled up
        with empty chunks. Prompts that are short and have no weights are encoded as `encode` does
        it. Raises PromptError for weights that cannot be read.
        """
        prompts = [in_compel_syntax(prompt) for prompt in prompts]
        if not any(self._needs_compel(prompt) for prompt in prompts):
            return self.encode(prompts)
        texts = []
        for prompt in prompts:
            if self._needs_compel(prompt):
                texts.append(self._encode_weighted(prompt))
            else:
                texts.append(self.encode([prompt])[0])
        empty = self.encode([""])[0]
        longest = max(text.shape[1] for text in texts)
        filled = []
        for text in texts:
            num_empty = (longest - text.shape[1]) // empty.shape[1]
            filled.append(torch.cat([text, *[empty] * num_empty], dim=1))
        _, pooled = self.encode([without_weights(prompt) for prompt in prompts])
        return torch.cat(filled), pooled

    def is_cut(self, prompt: str) -> bool:
        """Return whether `encode` leaves out the end of a prompt."""
        tokenizer = self.tokenizers[0]
        with _TOKENIZING:
            length = len(tokenizer(prompt, verbose=False).input_ids)
        return length > int(tokenizer.model_max_length)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of the prompt that the vocabulary holds only in pieces, in order."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", without_weights(prompt).lower()))
        with _TOKENIZING:
            return [word for word in words if len(self.tokenizers[0].tokenize(word)) > 1]

    def _needs_compel(self, prompt: str) -> bool:
        """Whether a prompt has weights, or is longer than the tokenizer's limit."""
        tokenizer = self.tokenizers[0]
        with _TOKENIZING:
            length = len(tokenizer(prompt, verbose=False).input_ids)
        return length > int(tokenizer.model_max_length) or has_weights(prompt)

    def _encode_weighted(self, prompt: str) -> Float[Tensor, "1 tokens width"]:
        """Encode a prompt in compel's syntax, of any length; PromptError where compel cannot."""
        with _TOKENIZING, quiet_transformers():
            from compel import Compel, ReturnedEmbeddingsType

            layer = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            texts = []
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
                try:
                    compel = Compel(
                        tokenizer,
                        encoder,
                        returned_embeddings_type=layer,
                        truncate_long_prompts=False,
                    )
                    texts.append(compel(prompt))
                except Exception as error:  # compel raises errors of many kinds
                    raise PromptError(
                        f"cannot weigh {prompt!r} ({error}). Write (red apple)1.3, red++ or red-."
                    ) from error
            return torch.cat(texts, dim=-1)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers for a block.

    It would draw a progress bar for every small file, and ask for torchvision, which is not used.
    """
    has_progress_bar = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_progress_bar:
            logging.enable_progress_bar()
