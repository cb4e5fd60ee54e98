"""CLIP's tokenizer by the library that transformers' own is built on.

That one is imported in a moment. It splits prompts as transformers does, for drawing; who writes
models has transformers' own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from twostep.formats.locate import read_json

TOKENIZING = RLock()
"""Tokenizers of transformers keep settings between calls, so one thread at a time uses them."""


def forget_lengths(tokenizer: Any) -> None:
    """Take the lengths of its last call off a tokenizer of transformers, before it is saved.

    They would be written into its file, which would then depend on whether the process that writes
    it has encoded anything.
    """
    with TOKENIZING:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


_END_OF_WORD = "</w>"

_WORDS = "|".join(
    [
        r"<\|startoftext\|>|<\|endoftext\|>",
        r"'s|'t|'re|'ve|'m|'ll|'d",
        r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    ]
)
"""What CLIP takes for one word: its marks, English endings, letters, one digit, or signs."""

_MARKS = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The entries of a tokenizer's config that name its marks."""


@dataclass(frozen=True)
class WordIds:
    """The numbers of the tokens of one text, or of several."""

    input_ids: Any

    def __getitem__(self, name: str) -> Any:
        """Return the numbers, by the name that transformers gives them."""
        return getattr(self, name)


class ClipWords:
    """CLIP's tokenizer, as far as drawing needs it, with the methods that transformers' has.

    It keeps no settings between calls, so that threads may share it.

    Args:
        vocabulary: The number of every token.
        merges: The pairs of pieces that are joined, in order.
        max_tokens: The most tokens of a text, its two marks included.
        begin: The mark of the beginning.
        end: The mark of the end.
        pad: What short texts are filled up with.

    `folder` is where it was read from, if it was.
    """

    folder: Path | None = None

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        max_tokens: int,
        begin: str,
        end: str,
        pad: str,
    ) -> None:
        self.model_max_length = max_tokens
        self.backend = Tokenizer(
            BPE(
                vocab=dict(vocabulary),
                merges=list(merges),
                continuing_subword_prefix="",
                end_of_word_suffix=_END_OF_WORD,
                unk_token=end,
            )
        )
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        self.backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), spaces, normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
        self.backend.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.backend.decoder = decoders.ByteLevel()
        marks = dict.fromkeys((begin, end, pad))
        self.backend.add_special_tokens(
            [AddedToken(mark, normalized=False, special=True) for mark in marks]
        )
        numbers = self.convert_tokens_to_ids((begin, end, pad))
        self.bos_token_id, self.eos_token_id, self.pad_token_id = numbers
        self.backend.post_processor = processors.RobertaProcessing(
            (end, self.eos_token_id), (begin, self.bos_token_id), False, False
        )

    @classmethod
    def read(cls, folder: Path) -> ClipWords | None:
        """Read the tokenizer of a model folder; None where it is not simply one of CLIP's."""
        config = _json(folder / "tokenizer_config.json")
        whole = _json(folder / "tokenizer.json")
        marks = [_plain(config.get(name)) for name in _MARKS]
        if config.get("tokenizer_class") != "CLIPTokenizer" or None in marks:
            return None
        begin, end, unknown, pad = marks
        extras = {
            each["content"]
            for each in (
                *whole.get("added_tokens", ()),
                *config.get("added_tokens_decoder", {}).values(),
            )
        }
        model = whole.get("model") or _separate(folder)
        is_known = bool(model) and unknown == end and extras <= {begin, end, pad}
        if not is_known or not isinstance(config.get("model_max_length"), int):
            return None
        words = cls(
            model["vocab"],
            [_pair(merge) for merge in model["merges"]],
            max_tokens=config["model_max_length"],
            begin=str(begin),
            end=str(end),
            pad=str(pad),
        )
        words.folder = folder
        return words

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: str | bool = False,
        truncation: bool = False,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> WordIds:
        """Return the tokens of a text, or of several, with their two marks.

        Args:
            text: One text, or several.
            padding: "max_length" fills up to the most tokens; anything else to nothing.
            truncation: Whether what is longer is cut off before the mark of the end.
            return_tensors: "pt" for a tensor [texts, tokens] of texts of one length.
            verbose: Whatever callers of transformers say: nothing is printed.
        """
        texts = [text] if isinstance(text, str) else list(text)
        most = self.model_max_length
        lists = []
        for each in texts:
            ids = list(self.backend.encode(each).ids)
            if truncation and len(ids) > most:
                ids = [*ids[: most - 1], self.eos_token_id]
            if padding == "max_length":
                ids += [self.pad_token_id] * (most - len(ids))
            lists.append(ids)
        if return_tensors == "pt":
            # Drawings from recordings do without torch.
            import torch

            return WordIds(torch.tensor(lists))
        return WordIds(lists[0] if isinstance(text, str) else lists)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without marks."""
        return list(self.backend.encode(text, add_special_tokens=False).tokens)

    def add_tokens(self, names: Sequence[str]) -> int:
        """Make further tokens known, and return how many were not known before."""
        return int(self.backend.add_tokens(list(names)))

    def convert_tokens_to_ids(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of tokens; that of the end for what is not known."""
        numbers = [self.backend.token_to_id(name) for name in names]
        return [self.eos_token_id if number is None else number for number in numbers]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of numbers."""
        return [str(self.backend.id_to_token(number)) for number in ids]


def words_in_pieces(text: str, tokenize: Callable[[str], Sequence[str]]) -> tuple[str, ...]:
    """Return the words of a text that a vocabulary holds only in pieces, in order, each once.

    Args:
        text: A prompt without weights.
        tokenize: Returns the tokens of a word.
    """
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", text.lower()))
    return tuple(word for word in words if len(tokenize(word)) > 1)


def unknown_words_warning(model: str, words: Sequence[str]) -> str:
    """Return what a person is told of words that a model's vocabulary holds only in pieces."""
    return (
        f"not in the vocabulary of {model}: {', '.join(dict.fromkeys(words))}. "
        "It has never seen these words, so expect nothing of them."
    )


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _separate(folder: Path) -> dict[str, Any]:
    """Return vocabulary and merges of two files; nothing where they are not there."""
    vocabulary = folder / "vocab.json"
    merges = folder / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return {}
    lines = merges.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line and not line.startswith("#version")]
    return {"vocab": json.loads(vocabulary.read_text(encoding="utf-8")), "merges": kept}


def _plain(mark: Any) -> str | None:
    """Return a mark as text; None for one that wants to be found in another way."""
    if isinstance(mark, dict) and not (mark.get("lstrip") or mark.get("rstrip")):
        mark = mark.get("content")
    return mark if isinstance(mark, str) else None


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second
