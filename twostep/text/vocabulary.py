"""CLIP's tokenizers, for models that come without: SDXL in one file, and folders of configs alone.

All that CLIP's vocabulary is made of is the list of its merges, which lies here as
`clip_merges.txt.gz`: the byte letters, the same at the end of a word, every merge in order, and the
two marks of beginning and end.
"""

import gzip
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from twostep.text.words import ClipWords

MERGES = Path(__file__).with_name("clip_merges.txt.gz")

MAX_TOKENS = 77
"""The most tokens of a prompt, its two marks included."""

BEGIN = "<|startoftext|>"
END = "<|endoftext|>"
_END_OF_WORD = "</w>"


def clip_tokenizer(pad: str = END) -> Any:
    """Return CLIP's tokenizer, as transformers has it.

    Args:
        pad: what short prompts are filled up with: the end's own mark for SDXL's first text
            encoder, "!" for its second.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
        model_max_length=MAX_TOKENS,
    )


def clip_words(pad: str = END) -> ClipWords:
    """Return CLIP's tokenizer for drawing; `pad` is as in `clip_tokenizer`."""
    vocabulary, merges = _vocabulary()
    return ClipWords(vocabulary, merges, max_tokens=MAX_TOKENS, begin=BEGIN, end=END, pad=pad)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the number of every token, and the merges in order."""
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}{_END_OF_WORD}" for letter in letters)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += [BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [merge.split(" ") for merge in merges]
    return vocabulary, [(first, second) for first, second in pairs]


def _byte_letters() -> list[str]:
    """Return the letters that stand for bytes, in CLIP's order.

    Bytes that can be printed stand for themselves and come first; the others follow in the order of
    their values, as letters that are counted on from 256.
    """
    letters = pre_tokenizers.ByteLevel.alphabet()
    return sorted(letters, key=lambda letter: (ord(letter) >= 256, ord(letter)))
