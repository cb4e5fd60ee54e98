"""The tokenizer for drawing splits prompts as that of transformers does."""

import copy
import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from twostep.formats.locate import WEIGHTS
from twostep.text.vocabulary import END, clip_tokenizer, clip_words
from twostep.text.words import ClipWords

PROMPTS = [
    "",
    "a 3d red apple on a blue background",
    "  It's  THE\tbest—isn't it?!! 1234 ½ ",
    "naïve café e\u0301, 東京, Привет, \U0001f34e\U0001f34f, ﬁ",
    "<|endoftext|> in the <|startoftext|>middle! !",
    "\x00\u200b\ufeff odd  spaces\u00a0\u2003here",
    "word " * 90,
    "supercalifragilisticexpialidocious_and-more...",
]


def assert_same(words: ClipWords, known: CLIPTokenizer) -> None:
    assert words.model_max_length == known.model_max_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(words, name) == getattr(known, name)
    for prompt in PROMPTS:
        assert words.tokenize(prompt) == known.tokenize(prompt)
        assert words(prompt, verbose=False).input_ids == known(prompt, verbose=False).input_ids
    settings = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = words(PROMPTS, **settings).input_ids
    assert ids.tolist() == known(PROMPTS, **settings).input_ids.tolist()
    assert (
        words(PROMPTS, truncation=True)["input_ids"]
        == (known(PROMPTS, truncation=True)["input_ids"])
    )


@pytest.mark.parametrize("pad", [END, "!"])
def test_clips_own(pad: str) -> None:
    assert_same(clip_words(pad), clip_tokenizer(pad))


def test_of_a_folder() -> None:
    folder = WEIGHTS / "nano" / "tokenizer"
    words = ClipWords.read(folder)
    known = CLIPTokenizer.from_pretrained(folder)
    assert words is not None
    assert_same(words, known)
    more = [copy.deepcopy(each) for each in (words, known)]
    names = ["<emb0v0>", "<emb0v1>"]
    for each in more:
        assert each.add_tokens(names) == 2
    ids = [each("a <emb0v0> <emb0v1>apple").input_ids for each in more]
    assert ids[0] == ids[1]
    assert more[0].convert_tokens_to_ids(names) == more[1].convert_tokens_to_ids(names)
    assert more[0].convert_ids_to_tokens(ids[0]) == more[1].convert_ids_to_tokens(ids[1])
    assert words("<emb0v0>").input_ids == known("<emb0v0>").input_ids  # which knows none


def test_of_separate_files_as_first_published(tmp_path: Path) -> None:
    whole = json.loads((WEIGHTS / "nano" / "tokenizer" / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = [each if isinstance(each, str) else " ".join(each) for each in whole["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    end = {"__type": "AddedToken", "content": END, "lstrip": False, "normalized": True}
    config = {
        "bos_token": "<|startoftext|>",
        "eos_token": end,
        "unk_token": END,
        "pad_token": "!",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    words = ClipWords.read(tmp_path)
    assert words is not None
    assert_same(words, CLIPTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "T5Tokenizer"},
        {"unk_token": "!"},
        {"pad_token": {"content": "!", "lstrip": True}},
        {"added_tokens_decoder": {"9": {"content": "<mine>"}}},
    ],
)
def test_what_is_unusual_is_left_to_transformers(tmp_path: Path, changes: dict) -> None:
    folder = WEIGHTS / "nano" / "tokenizer"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    assert ClipWords.read(tmp_path) is None
    assert ClipWords.read(tmp_path / "nowhere") is None
