"""SDXL's two text encoders as one: captions -> text embeddings, pooled embedding; and the words
they do not know.
"""

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

_A1111 = re.compile(r"\(([^()]+):(\d*\.?\d+)\)")
_WEIGHTS = re.compile(r'(?<=[\w)"])[+-]+(?!\w)|(?<=\))\d*\.?\d+|\.(and|blend)\([^)]*\)')
"""The syntax of compel: red++, (red apple)1.3, ("a fox", "a dog").blend(0.7, 0.3); and A1111's (red
apple:1.3).
"""

Encoded = tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch pooled"]]
_TURN = RLock()
"""Tokenizers keep settings between calls, so one thread at a time."""


class PromptError(TwostepError):
    """Weights in a prompt that cannot be read."""


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Two CLIP text encoders; the penultimate layers of both, and the pooled projection of the
    second.

    `zeros_for_empty`: the empty prompt is all zeros, as SDXL was trained, instead of what the
    encoders make of it.
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

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """Encode prompts; what is longer than the tokenizer's limit is cut off there."""
        layers = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            with _TURN:
                tokens = tokenizer(
                    list(prompts), padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids
            answer = encoder(tokens.to(encoder.device), output_hidden_states=True)
            layers.append(answer.hidden_states[-2])
        text, pooled = torch.cat(layers, dim=-1), answer[0]
        if self.zeros_for_empty:
            said = torch.tensor([prompt != "" for prompt in prompts], device=text.device)
            text, pooled = text * said[:, None, None], pooled * said[:, None]
        return text, pooled

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels; `whole` as `encode_whole`
        does it.
        """
        text, pooled = self.encode_whole(prompts) if whole else self.encode(prompts)
        return Conditioning(
            text, pooled, image_sizes(len(text), width, height).to(text.device, text.dtype)
        )

    def encode_whole(self, prompts: Sequence[str]) -> Encoded:
        """Encode prompts with their weights, and what lies beyond the tokenizer's limit in further
        chunks.

        Prompts that need neither are encoded as `encode` does it; shorter ones are filled up with
        empty chunks.
        """
        read = [_A1111.sub(r"(\1)\2", prompt) for prompt in prompts]
        if not any(map(self._needs_compel, read)):
            return self.encode(prompts)
        texts = [
            self._weighted(prompt) if self._needs_compel(prompt) else self.encode([prompt])[0]
            for prompt in read
        ]
        empty, longest = self.encode([""])[0], max(text.shape[1] for text in texts)
        filled = [
            torch.cat([t, *[empty] * ((longest - t.shape[1]) // empty.shape[1])], dim=1)
            for t in texts
        ]
        return torch.cat(filled), self.encode([_words(prompt) for prompt in read])[1]

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of the prompt that the vocabulary holds only in pieces, in order."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", _words(prompt).lower()))
        with _TURN:
            return [word for word in words if len(self.tokenizers[0].tokenize(word)) > 1]

    def _needs_compel(self, prompt: str) -> bool:
        with _TURN:
            length = len(self.tokenizers[0](prompt, verbose=False).input_ids)
        return (
            length > int(self.tokenizers[0].model_max_length) or _WEIGHTS.search(prompt) is not None
        )

    def _weighted(self, prompt: str) -> Float[Tensor, "1 tokens width"]:
        with _TURN, quiet_transformers():
            from compel import Compel, ReturnedEmbeddingsType

            layer = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            both = zip(self.tokenizers, self.encoders, strict=True)
            try:
                told = [
                    Compel(*of, returned_embeddings_type=layer, truncate_long_prompts=False)(prompt)
                    for of in both
                ]
            except Exception as error:  # whatever compel stumbles over
                raise PromptError(
                    f"cannot weigh {prompt!r} ({error}). Write (red apple)1.3, red++ or red-."
                ) from error
            return torch.cat(told, dim=-1)


def _words(prompt: str) -> str:
    """Return a prompt without its weights, if it has any."""
    return re.sub(r'[()"]', "", _WEIGHTS.sub("", prompt)) if _WEIGHTS.search(prompt) else prompt


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep it from drawing a bar for every small file, and from asking for torchvision, which
    nothing here uses.
    """
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
