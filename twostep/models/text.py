"""SDXL's two text encoders as one: captions -> text embeddings, pooled embedding; and the words they do not know."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.models.conditioning import Conditioning, image_sizes


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Two CLIP text encoders; the penultimate layers of both, and the pooled projection of the second.

    `zeros_for_empty`: the empty prompt is all zeros, as SDXL was trained, instead of what the encoders make of it.
    """

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    zeros_for_empty: bool = False

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch pooled"]]:
        """Encode prompts; what is longer than the tokenizer's limit is cut off there."""
        layers, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            tokens = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(encoder.device)
            answer = encoder(tokens, output_hidden_states=True)
            layers.append(answer.hidden_states[-2])
            pooled = answer[0]
        assert pooled is not None
        text = torch.cat(layers, dim=-1)
        if self.zeros_for_empty:
            said = torch.tensor([prompt != "" for prompt in prompts], device=text.device)
            text, pooled = text * said[:, None, None], pooled * said[:, None]
        return text, pooled

    def conditioning(self, prompts: Sequence[str], width: int, height: int) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels."""
        text, pooled = self.encode(prompts)
        return Conditioning(text, pooled, image_sizes(len(text), width, height).to(text.device, text.dtype))

    def num_excess_tokens(self, prompt: str) -> int:
        """Return how many tokens at the end of the prompt are cut off."""
        tokenizer = self.tokenizers[0]
        return max(0, len(tokenizer(prompt, verbose=False).input_ids) - int(tokenizer.model_max_length))

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of the prompt that the vocabulary holds only in pieces, in order."""
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
        return [word for word in words if len(self.tokenizers[0].tokenize(word)) > 1]
