"""Weights in prompts and prompts beyond the limit, against compel itself; plain prompts stay the
same to the bit.
"""

from pathlib import Path

import pytest
import torch
from compel import CompelForSDXL

from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pretrain.model import random_bundle
from twostep.text.clip import PromptError

from ..vanilla import assemble

PLAIN = "a 3d red apple on a blue background"
LONG = f"{PLAIN}, " * 5 + "a drawn dog"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


def compelled(bundle: Bundle, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    told = CompelForSDXL(assemble(bundle))(prompt, style_prompt=prompt)
    return told.embeds, told.pooled_embeds


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "prompt", [PLAIN, "", "a t-shirt", "a fox - a dog", 'a "quoted" fox, 3:4', "x" * 18]
)
def test_plain_prompts_are_encoded_as_ever(bundle: Bundle, prompt: str) -> None:
    for ours, plain in zip(
        bundle.text.encode_whole([prompt, ""]), bundle.text.encode([prompt, ""]), strict=True
    ):
        assert same(ours, plain)


@pytest.mark.parametrize(
    "prompt",
    [
        "a 3d red++ apple",
        "a (3d red)1.4 apple on a (blue)0.5 background",
        "a red- apple",
        '("a red apple", "a green dog").blend(0.7, 0.3)',
        '("a red apple", "a green dog").and()',
    ],
)
def test_weights_are_compel_s(bundle: Bundle, prompt: str) -> None:
    text, _ = bundle.text.encode_whole([prompt])
    assert same(text, compelled(bundle, prompt)[0])
    assert not same(text, bundle.text.encode([prompt])[0])


def test_weights_of_a1111_are_understood(bundle: Bundle) -> None:
    ours = bundle.text.encode_whole(["a (3d red:1.4) apple"])
    for part, expected in zip(ours, bundle.text.encode_whole(["a (3d red)1.4 apple"]), strict=True):
        assert same(part, expected)


def test_the_pooled_embedding_is_of_the_words_alone(bundle: Bundle) -> None:
    for weighted in (
        "a (red)1.4 apple on++ a blue background",
        "a (red:1.4) apple on a blue+ background",
    ):
        assert same(
            bundle.text.encode_whole([weighted])[1],
            bundle.text.encode(["a red apple on a blue background"])[1],
        )
        assert bundle.text.unknown_words(weighted) == []


def test_long_prompts_go_into_further_chunks(bundle: Bundle) -> None:
    text, pooled = bundle.text.encode_whole([LONG])
    theirs, pooled_theirs = compelled(bundle, LONG)
    assert text.shape[1] > 20 and text.shape[1] % 20 == 0
    assert same(text, theirs) and same(pooled, pooled_theirs)


def test_a_short_prompt_beside_a_long_one_is_filled_with_empty_chunks(bundle: Bundle) -> None:
    text, pooled = bundle.text.encode_whole([LONG, "flat"])
    (short, pooled_short), empty = bundle.text.encode(["flat"]), bundle.text.encode([""])[0]
    assert same(text[1:, :20], short) and same(text[1:, 20:40], empty)
    torch.testing.assert_close(pooled[1:], pooled_short)


@pytest.mark.parametrize("prompt", ["()0.5", ')++1.41.4 " "-)+ared'])
def test_weights_of_nothing_are_told(bundle: Bundle, prompt: str) -> None:
    with pytest.raises(PromptError, match=r"cannot weigh .*Write"):
        bundle.text.encode_whole([prompt])


def test_tokenizers_are_saved_alike_whether_they_were_used_or_not(tmp_path: Path) -> None:
    """Lengths of the last call would be in their files otherwise."""
    text = random_bundle().text
    for used in (False, True):
        if used:
            text.encode(["a red fox"])
        for number, tokenizer in enumerate(text.tokenizers_to_save()):
            tokenizer.save_pretrained(tmp_path / str(used) / str(number))
    for number in ("0", "1"):
        unused, used = (tmp_path / state / number / "tokenizer.json" for state in ("False", "True"))
        assert used.read_bytes() == unused.read_bytes()
    tokens = text.tokenizers[0](["a"], padding="max_length", truncation=True).input_ids
    assert len(tokens[0]) == text.tokenizers[0].model_max_length
