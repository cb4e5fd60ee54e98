"""Tokenizers of the built-in models: every word of their captions is one token."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

_START = "<|startoftext|>"
_END = "<|endoftext|>"


def build_tokenizer(corpus: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """Build a CLIP tokenizer over the words of a corpus.

    Its vocabulary holds all bytes, all bytes that end a word, and the merges that make every word
    of the corpus one token. Longer texts than `max_tokens` are cut off.
    """
    splitter = CLIPTokenizer().backend_tokenizer
    words: set[str] = set()
    for text in corpus:
        normalised = splitter.normalizer.normalize_str(text)
        words.update(word for word, _ in splitter.pre_tokenizer.pre_tokenize_str(normalised))
    merges = learn_merges(sorted(words))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge) for merge in merges),
        _START,
        _END,
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_tokens)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges (arXiv 1508.07909) that leave every word one token.

    The tokenizers library has a trainer too, but breaks ties by the order of a hash map, so the
    same corpus gives another vocabulary each time.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair in the pieces of a word."""
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
