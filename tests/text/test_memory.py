"""A prompt that is drawn again is not encoded again, and its pictures stay the same to the bit."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from twostep.formats.locate import WEIGHTS
from twostep.models.loading import load_bundle
from twostep.models.lora_stack import LoraCache
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
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
