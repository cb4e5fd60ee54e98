"""Textual inversions in text encoders: new tokens, without a change to the encoder itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from twostep.formats.embeddings import Embedding, EmbeddingError
from twostep.text.prompt_weights import PromptError

_NAMED = re.compile(r"\bembedding:(?P<name>[\w.-]+)")
"""A textual inversion as ComfyUI has it in a prompt."""

_ENDINGS = (".safetensors", ".pt", ".bin")

TOKEN = re.compile(r"<emb\d+v\d+>")
"""The tokens that stand for the vectors."""


class ExtendedEmbedding(nn.Module):
    """The table of token vectors, with further vectors behind it.

    Args:
        table: The encoder's own, which is shared.
        vectors: Those of the new tokens [number, width].
    """

    def __init__(self, table: nn.Embedding, vectors: Tensor) -> None:
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The encoder's own table."""
        return self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the vectors of tokens."""
        size = self.table.num_embeddings
        known = self.table(tokens.clamp(max=size - 1))
        new = nn.functional.embedding((tokens - size).clamp(min=0), self.vectors)
        return torch.where((tokens >= size)[..., None], new.to(known), known)


def place_embeddings(prompt: str, names: Mapping[str, int]) -> str:
    """Return a prompt with the tokens of textual inversions in the place of their names.

    Both "embedding:name" and the bare name are replaced; the longest name that fits counts.

    Args:
        prompt: The prompt.
        names: By name, in the order in which they were added, how many tokens each takes.

    Raises:
        PromptError: If the prompt asks for an embedding that is not there.
    """
    tokens = {}
    for index, (name, count) in enumerate(names.items()):
        tokens[name] = " ".join(f"<emb{index}v{vector}>" for vector in range(count))

    def placed(match: re.Match[str]) -> str:
        if match["bare"] is not None:
            return f" {tokens[match['bare']]} "
        name = match["name"]
        for ending in _ENDINGS:
            name = name.removesuffix(ending)
        # A full stop may end the sentence.
        for known in (name, name.rstrip(".")):
            if known in tokens:
                return f" {tokens[known]} {name[len(known) :]}"
        there = ", ".join(tokens) or "none"
        raise PromptError(
            f"the prompt asks for embedding:{name}, and there are {there}. Give its file or folder "
            "with --lora."
        )

    # All at once: a name may be part of another one, or of the tokens.
    bare = "|".join(re.escape(name) for name in sorted(tokens, key=len, reverse=True)) or "(?!)"
    pattern = rf"{_NAMED.pattern}|(?<!\w)(?P<bare>{bare})(?!\w)"
    return re.sub(pattern, placed, prompt)


def with_tokens(
    part: str, tokenizer: Any, encoder: Any, embeddings: Sequence[Embedding]
) -> tuple[Any, Any]:
    """Return copies of a tokenizer and its encoder that know textual inversions.

    The copy shares all weights. Raises EmbeddingError for vectors of another width.

    Args:
        part: Which of the vectors are meant, "text_encoder" or "text_encoder_2".
        tokenizer: The tokenizer.
        encoder: The text encoder.
        embeddings: The textual inversions, whose tokens are added in this order.
    """
    table = encoder.get_input_embeddings()
    if isinstance(table, ExtendedEmbedding):
        raise EmbeddingError(
            "these text encoders have textual inversions already; add all at once."
        )
    width = table.weight.shape[1]
    for embedding in embeddings:
        given = embedding.vectors[part].shape[1]
        if given != width:
            raise EmbeddingError(
                f"{embedding.source} has vectors of {given} numbers for {part}, which here has "
                f"{width}. It was made for another model."
            )
    extended = copy.deepcopy(tokenizer)
    names = [
        f"<emb{index}v{vector}>"
        for index, embedding in enumerate(embeddings)
        for vector in range(embedding.count)
    ]
    extended.add_tokens(names)
    ids = extended.convert_tokens_to_ids(names)
    size = table.num_embeddings
    if ids != list(range(size, size + len(names))):
        raise EmbeddingError(
            f"the tokenizer of {part} has {ids[0]} tokens and its encoder {size}; nothing can be "
            "added to it."
        )
    shared = {id(weight): weight for weight in chain(encoder.parameters(), encoder.buffers())}
    copied = copy.deepcopy(encoder, shared)
    vectors = torch.cat([embedding.vectors[part] for embedding in embeddings])
    copied.set_input_embeddings(ExtendedEmbedding(table, vectors.to(table.weight)))
    for module in copied.modules():
        # Where configs say 2, the pooled token would be that of the largest number: a new one.
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = extended.eos_token_id
    return extended, copied
