"""SDXL's two CLIP text encoders as one: prompts -> text embeddings and pooled embeddings."""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from twostep.diffusion.shapes import sent
from twostep.formats.embeddings import Embedding
from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.text.embeddings import TOKEN, place_embeddings, with_tokens
from twostep.text.memory import PromptMemory
from twostep.text.prompt_weights import (
    PromptError,
    has_weights,
    in_compel_syntax,
    is_conjunction,
    parse_prompt,
    without_weights,
)
from twostep.text.words import TOKENIZING, forget_lengths, words_in_pieces

Embeddings = tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch pooled"]]
"""Text embeddings and pooled embeddings."""

_Finding = TypeVar("_Finding")


@dataclass(frozen=True, eq=False)
class TextEncoders:
    """Two CLIP text encoders.

    Text embeddings are the penultimate layers of both, side by side; the pooled embedding is the
    projection of the second (section 2.1 of arXiv 2307.01952).

    Args:
        tokenizers: One for each encoder, of transformers; or a `ClipWords`, which is enough to
            draw.
        encoders: The networks: of transformers, or `LeanClip`s, which are enough to draw.
        zeros_for_empty: Whether the empty prompt is all zeros, as SDXL was trained, instead of
            what the encoders make of it.
        embeddings: The textual inversions that prompts may name, and how many tokens each takes.
        memory: Keeps what was encoded without gradients, where the weights do not change.
    """

    tokenizers: tuple[Any, Any]
    encoders: tuple[Any, Any]
    zeros_for_empty: bool = False
    embeddings: Mapping[str, int] = field(default_factory=dict)
    memory: PromptMemory | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the encoders without what transformers hooked into them, and
        nothing that was encoded.
        """
        encoders = tuple(_without_hooks(encoder) for encoder in self.encoders)
        return {**vars(self), "encoders": encoders, "memory": None}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders by the names that diffusers gives them."""
        first, second = self.encoders
        return {"text_encoder": first, "text_encoder_2": second}

    def with_networks(self, networks: Mapping[str, Any]) -> "TextEncoders":
        """Return these text encoders with other networks in the place of their own."""
        encoders = (networks["text_encoder"], networks["text_encoder_2"])
        memory = self.memory
        if memory is not None and any(
            a is not b for a, b in zip(encoders, self.encoders, strict=True)
        ):
            memory = PromptMemory()
        return replace(self, encoders=encoders, memory=memory)

    def remembering(self) -> "TextEncoders":
        """Return these text encoders with a memory of what they encode without gradients.

        Their weights must not change any more.
        """
        return replace(self, memory=PromptMemory())

    def with_embeddings(self, embeddings: Sequence[Embedding]) -> "TextEncoders":
        """Return text encoders that know textual inversions too, all at once.

        Raises EmbeddingError for one that was made for another model.
        """
        if not embeddings:
            return self
        extended = [
            with_tokens(part, tokenizer, encoder, embeddings)
            for part, tokenizer, encoder in zip(
                self.networks, self.tokenizers, self.encoders, strict=True
            )
        ]
        (first, first_encoder), (second, second_encoder) = extended
        return replace(
            self,
            tokenizers=(first, second),
            encoders=(first_encoder, second_encoder),
            embeddings={embedding.name: embedding.count for embedding in embeddings},
            memory=None if self.memory is None else PromptMemory(),
        )

    def tokenizers_to_save(self) -> tuple[Any, Any]:
        """Return the tokenizers without the lengths of their last call."""
        for tokenizer in self.tokenizers:
            forget_lengths(tokenizer)
        return self.tokenizers

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        """Encode prompts; what is longer than the tokenizer's limit is cut off there."""
        tokens = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            with TOKENIZING:
                numbers = tokenizer(
                    list(prompts), padding="max_length", truncation=True, return_tensors="pt"
                ).input_ids
            tokens.append(sent(numbers, encoder.device))
        text, pooled = self.encode_tokens(tokens[0], tokens[1])
        if self.zeros_for_empty:
            is_text = sent(torch.tensor([prompt != "" for prompt in prompts]), text.device)
            text = text * is_text[:, None, None]
            pooled = pooled * is_text[:, None]
        return text, pooled

    def encode_tokens(
        self, first: Int[Tensor, "batch tokens"], second: Int[Tensor, "batch tokens"]
    ) -> Embeddings:
        """Encode the numbers of both tokenizers' tokens, each on its encoder's device."""
        layers = []
        for tokens, encoder in zip((first, second), self.encoders, strict=True):
            output = encoder(tokens, output_hidden_states=True)
            layers.append(output.hidden_states[-2])
        return torch.cat(layers, dim=-1), output[0]

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels.

        With `whole`, weights count and long prompts are not cut off, as `encode_whole` does it.
        """
        encode = self.encode_whole if whole else self.encode
        if self.memory is None or torch.is_grad_enabled():
            text, pooled = encode(prompts)
        else:
            # All prompts together, for they are filled up to the longest, and the last bits of a
            # product depend on how many there are.
            key = (tuple(prompts), whole, torch.is_inference_mode_enabled())
            text, pooled = self.memory.recall(key, lambda: encode(prompts))
        sizes = sent(image_sizes(len(text), width, height), text.device).to(text.dtype)
        return Conditioning(text, pooled, sizes)

    def encode_whole(self, prompts: Sequence[str]) -> Embeddings:
        """Encode prompts with their weights, and all that lies beyond the tokenizer's limit.

        A long prompt is encoded in chunks of the tokenizer's length, and the others are filled up
        with empty chunks. Prompts that are short and have no weights are encoded as `encode` does
        it. Raises PromptError for weights that cannot be read, and for textual inversions that are
        not there.
        """
        prompts = [place_embeddings(prompt, self.embeddings) for prompt in prompts]
        are_whole = [self._is_whole(prompt) for prompt in prompts]
        words = [without_weights(prompt) for prompt in prompts]
        if not any(are_whole):
            return self.encode(words)
        texts = []
        for prompt, text, is_whole in zip(prompts, words, are_whole, strict=True):
            texts.append(self._encode_weighted(prompt) if is_whole else self.encode([text])[0])
        empty = self.encode([""])[0]
        longest = max(text.shape[1] for text in texts)
        filled = []
        for encoded in texts:
            num_empty = (longest - encoded.shape[1]) // empty.shape[1]
            filled.append(torch.cat([encoded, *[empty] * num_empty], dim=1))
        _, pooled = self.encode(words)
        return torch.cat(filled), pooled

    def is_cut(self, prompt: str) -> bool:
        """Return whether `encode` leaves out the end of a prompt."""
        return self._found("is cut", prompt, self._is_long)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of the prompt that the vocabulary holds only in pieces, in order."""
        return list(self._found("unknown words", prompt, self._words_in_pieces))

    def _found(self, what: str, prompt: str, find: Callable[[str], _Finding]) -> _Finding:
        """Return what is found in a prompt, from the memory if there is one."""
        if self.memory is None:
            return find(prompt)
        return self.memory.found((what, prompt), lambda: find(prompt))

    def _is_long(self, text: str) -> bool:
        """Whether a text is longer than the tokenizer's limit."""
        tokenizer = self.tokenizers[0]
        with TOKENIZING:
            length = len(tokenizer(text, verbose=False).input_ids)
        return length > int(tokenizer.model_max_length)

    def _words_in_pieces(self, prompt: str) -> tuple[str, ...]:
        text = TOKEN.sub(" ", without_weights(place_embeddings(prompt, self.embeddings)))
        with TOKENIZING:
            return words_in_pieces(text, self.tokenizers[0].tokenize)

    def _is_whole(self, prompt: str) -> bool:
        """Whether a prompt has weights, or is longer than the tokenizer's limit."""
        return self._is_long(without_weights(prompt)) or has_weights(prompt)

    def _encode_weighted(self, prompt: str) -> Float[Tensor, "1 tokens width"]:
        """Encode a prompt of any length with its weights; PromptError where compel cannot."""
        weighers = [
            _compel(tokenizer, encoder)
            for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True)
        ]
        with TOKENIZING, quiet_transformers():
            try:
                encoded = [weigher.of(prompt) for weigher in weighers]
            except PromptError:
                raise
            except Exception as error:  # compel raises errors of many kinds
                raise PromptError(
                    f"cannot weigh {prompt[:80]!r} ({error}). Write (red apple:1.3) or red++."
                ) from error
            return torch.cat(encoded, dim=-1)


def _without_hooks(encoder: Any) -> Any:
    """Return a copy of an encoder that shares its weights and can be pickled.

    transformers hooks local functions in when hidden states are first asked for; it does so again.
    """
    shared = {id(weight): weight for weight in chain(encoder.parameters(), encoder.buffers())}
    copied = copy.deepcopy(encoder, shared)
    for module in copied.modules():
        for key, hook in list(module._forward_hooks.items()):
            if "<locals>" in getattr(hook, "__qualname__", ""):
                del module._forward_hooks[key]
        if hasattr(module, "_output_capturing_hooks_installed"):
            module._output_capturing_hooks_installed = False
    return copied


@dataclass(frozen=True, eq=False)
class _Weigher:
    """compel with one encoder, which is not asked twice for the same chunk."""

    compel: Any

    def of(self, prompt: str) -> Float[Tensor, "1 tokens width"]:
        """Encode a prompt with its weights."""
        from compel.prompt_parser import FlattenedPrompt
        from compel.prompt_parser import Fragment as CompelFragment

        if is_conjunction(prompt):
            encoded: Tensor = self.compel(in_compel_syntax(prompt))
            return encoded
        chunks = []
        # compel's own parser takes minutes for thousands of words, so it is given what is parsed.
        for part in parse_prompt(prompt):
            fragments = [CompelFragment(each.text, each.weight) for each in part]
            flat = FlattenedPrompt(fragments)
            with torch.no_grad():
                (chunk, _), _ = self.compel.build_conditioning_tensor_for_prompt_object(flat)
            chunks.append(chunk)
        return torch.cat(chunks, dim=1)


def _compel(tokenizer: Any, encoder: Any) -> _Weigher:
    """Return compel with an encoder."""
    from compel import Compel, ReturnedEmbeddingsType

    compel = Compel(
        tokenizer,
        encoder,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        truncate_long_prompts=False,
    )
    provider = compel.conditioning_provider
    encode = provider._encode_token_ids_to_embeddings
    known: dict[tuple[int, ...], Tensor] = {}

    def encode_once(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        # What is said more quietly is encoded without it too: all chunks again, most of them alike.
        key = (*tokens.flatten().tolist(), *([] if mask is None else mask.flatten().tolist()))
        if key not in known:
            known[key] = encode(tokens, mask)
        return known[key]

    split = provider._find_next_best_split_point

    def split_soon(tokens: list[int], max_length: int) -> int:
        # It looks at the first chunk alone, but would first spell all that follows.
        best: int = split(tokens[: max_length + 1], max_length)
        return best

    provider._encode_token_ids_to_embeddings = encode_once
    provider._find_next_best_split_point = split_soon
    return _Weigher(compel)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers for a block.

    It would draw a progress bar for every small file, and ask for torchvision, which is not used.
    Where it is not imported there is nothing to silence.
    """
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging

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
