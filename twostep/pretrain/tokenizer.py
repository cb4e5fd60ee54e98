"""Tokenizers of the built-in models: every word of their captions is one token."""

from collections import Counter, defaultdict
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
    # How often every pair comes up, and in which words, are kept up to date: counted anew for each
    # merge, five thousand words would take ten minutes.
    counts: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for number, word in enumerate(pieces):
        for pair in pairwise(word):
            counts[pair] += 1
            places[pair].add(number)
    merges: list[tuple[str, str]] = []
    while counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for number in places.pop(best):
            old = pieces[number]
            counts.subtract(pairwise(old))
            pieces[number] = _merge(old, best)
            for pair in pairwise(pieces[number]):
                counts[pair] += 1
                places[pair].add(number)
        counts = +counts  # without those that are gone
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
