"""A prompt that is drawn again is not encoded again, and its pictures stay the same to the bit."""

from copy import deepcopy
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from twostep.formats.locate import WEIGHTS
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.text import memory
from twostep.text.clip import TextEncoders
from twostep.text.memory import PromptMemory

APPLE = Request("a 3d red apple", model="nano", steps=2)


class Counter:
    """How often a text encoder was called."""

    def __init__(self, text: object) -> None:
        assert isinstance(text, TextEncoders)
        self.num_calls = 0
        text.encoders[0].register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_calls += 1


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu")


def test_a_repeated_prompt_costs_no_encoder_call(studio: Studio) -> None:
    counter = Counter(studio.load(APPLE).text)
    first = studio.draw(APPLE)
    assert counter.num_calls == 1
    again = studio.draw(APPLE)
    other_seed = studio.draw(replace(APPLE, seed=1))
    assert counter.num_calls == 1
    fresh = Studio("cpu").draw(APPLE)
    assert first.images[0].tobytes() == again.images[0].tobytes() == fresh.images[0].tobytes()
    assert other_seed.images[0].tobytes() != first.images[0].tobytes()
    studio.draw(replace(APPLE, prompt="a drawn dog"))
    assert counter.num_calls == 2


def test_what_changes_the_text_encoders_has_a_memory_of_its_own(studio: Studio) -> None:
    text = studio.load(APPLE).text
    assert isinstance(text, TextEncoders) and text.memory is not None
    assert text.with_networks(text.networks).memory is text.memory
    changed = text.with_networks(
        {**text.networks, "text_encoder": deepcopy(text.encoders[0])}
    ).memory
    assert changed is not None and changed is not text.memory


def test_loras_that_leave_the_text_encoders_alone_share_its_memory() -> None:
    lora = str(WEIGHTS / "nano" / "students" / "nano_2step_lora.safetensors")
    model = LoraCache(load_bundle("nano").remembering())
    plain = model.apply([]).text
    styled = model.apply([lora]).text
    assert isinstance(plain, TextEncoders) and isinstance(styled, TextEncoders)
    assert plain.memory is not None and styled.memory is plain.memory


def test_nothing_is_kept_where_gradients_are(studio: Studio) -> None:
    text = studio.load(APPLE).text.remembering()
    counter = Counter(text)
    for _ in range(2):
        text.conditioning(["a drawn cat"], 64, 64)
    assert counter.num_calls == 2 and len(text.memory) == 0
    with torch.no_grad():
        kept = text.conditioning(["a drawn cat"], 64, 64)
        alike = text.conditioning(["a drawn cat"], 64, 64)
        whole = text.conditioning(["a drawn cat"], 64, 64, whole=True)
    assert counter.num_calls == 4 and len(text.memory) == 2
    assert kept.text is alike.text and torch.equal(kept.text, whole.text)


def test_what_was_used_longest_ago_leaves_first() -> None:
    def encoded() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(7), torch.zeros(1)  # 32 bytes

    memory = PromptMemory(max_bytes=64)
    calls: list[str] = []

    def ask(key: str) -> None:
        memory.recall(key, lambda: (calls.append(key), encoded())[1])

    for key in "abacab":
        ask(key)
    # a and b are kept; c takes the place of b, and b that of c.
    assert "".join(calls) == "abcb"
    memory.recall("large", lambda: (torch.zeros(100), torch.zeros(1)))
    assert len(memory) == 2


def test_what_is_found_in_a_prompt_is_looked_for_once(studio: Studio) -> None:
    text = studio.load(APPLE).text
    assert isinstance(text, TextEncoders)
    forgetful = replace(text, memory=None)
    prompts = ["a red fox", "a red xylograph", "red apple, " * 100]

    def found(encoders: TextEncoders) -> list[tuple[list[str], bool]]:
        return [(encoders.unknown_words(prompt), encoders.is_cut(prompt)) for prompt in prompts]

    expected = found(forgetful)
    assert expected[1][0] == ["xylograph"]
    assert [is_cut for _, is_cut in expected] == [False, False, True]
    assert found(text) == expected
    tokenizer = type(text.tokenizers[0])
    refusal = AssertionError("it was looked for again")
    with (
        patch.object(tokenizer, "tokenize", side_effect=refusal),
        patch.object(tokenizer, "__call__", side_effect=refusal),
    ):
        assert found(text) == expected
        with pytest.raises(AssertionError, match="again"):
            found(forgetful)


def test_of_findings_the_oldest_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_FINDINGS", 2)
    kept = PromptMemory()
    assert [kept.found(key, key.upper) for key in "abc"] == ["A", "B", "C"]
    assert kept.found("c", lambda: "made anew") == "C"
    assert kept.found("a", lambda: "made anew") == "made anew"
