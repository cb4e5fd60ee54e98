"""Prompts over a closed vocabulary."""

import pytest
import torch

from twostep.models.bundle import PromptEncoder
from twostep.pretrain.notes import note_prompts
from twostep.text.attributes import pitch_name, pitch_words

PROMPTS = note_prompts()


def named(prompt: str) -> set[str]:
    _, pooled = PROMPTS.encode([prompt])
    assert set(pooled.unique().tolist()) <= {0.0, 1.0}
    return {PROMPTS.vocabulary[place] for place in pooled[0].nonzero()[:, 0]}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", set()),
        ("a low piano note, soft", {"low", "piano", "soft"}),
        ("A Quiet SAX note at Bb4", {"soft", "saxophone", "key-a#", "octave-4"}),
        ("flute e-flat5", {"flute", "key-d#", "octave-5"}),
        ("cello Cb4", {"cello", "key-b", "octave-3"}),
        ("b#3 violin", {"violin", "key-c", "octave-4"}),
        ("a loud violin note, A4", {"violin", "loud", "key-a", "octave-4"}),
        ("a note", set()),
    ],
)
def test_a_prompt_names_its_words(prompt: str, words: set[str]) -> None:
    assert named(prompt) == words


def test_unknown_words_are_told() -> None:
    assert PROMPTS.unknown_words("a very low banjo note in C4") == ["banjo"]
    assert PROMPTS.unknown_words("a loud piano note, F#3") == []


def test_pitches_have_words_and_names() -> None:
    assert pitch_words(69) == ("key-a", "octave-4") and pitch_name(69) == "A4"
    assert pitch_name(60) == "C4" and pitch_name(49) == "C#3"
    for midi in range(48, 84):
        assert named(pitch_name(midi)) == set(pitch_words(midi))


def test_conditioning_is_that_of_the_empty_prompt_and_of_others() -> None:
    assert isinstance(PROMPTS, PromptEncoder)
    conditioning = PROMPTS.conditioning(["", "piano"], 16_384, 1)
    assert len(conditioning) == 2 and conditioning.text.shape == (2, 1, 0)
    assert conditioning.pooled.sum(dim=1).tolist() == [0, 1]
    assert torch.equal(PROMPTS.with_networks({}).encode(["piano"])[1], conditioning.pooled[1:])
