"""Weights in prompts as A1111 and compel write them: right numbers, escapes, and clear refusals."""

import random

import pytest
import torch

from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.text.prompt_weights import (
    PromptError,
    has_weights,
    parse_prompt,
    without_weights,
)

WEIGHTED = {
    "a (red:1.3) apple": [("a ", 1), ("red", 1.3), (" apple", 1)],
    "(red)": [("red", 1.1)],
    "((red))": [("red", 1.21)],
    "[red]": [("red", 1 / 1.1)],
    "[[red]]": [("red", 1 / 1.21)],
    "([red])": [("red", 1)],
    "(a (red:1.5) apple:0.5)": [("a ", 0.5), ("red", 0.75), (" apple", 0.5)],
    r"(red \(fruit\) apple:1.3)": [("red (fruit) apple", 1.3)],
    r"a \[b\] \(c\)": [("a [b] (c)", 1)],
    "(red apple)1.3": [("red apple", 1.3)],
    "(red apple)+": [("red apple", 1.1)],
    "red++ apple": [("red", 1.21), (" apple", 1)],
    "a red- apple": [("a ", 1), ("red", 0.9), (" apple", 1)],
    '"a fox"++ runs': [("a fox", 1.21), (" runs", 1)],
    "(red: 1.2 ) apple": [("red", 1.2), (" apple", 1)],
    "t-shirt, a - b, 3:4, :) 1)": [("t-shirt, a - b, 3:4, :) 1)", 1)],
    'a "quoted" word': [('a "quoted" word', 1)],
    "": [],
}


@pytest.mark.parametrize("prompt", WEIGHTED)
def test_a_prompt_has_the_weights_that_it_says(prompt: str) -> None:
    (part,) = parse_prompt(prompt)
    expected = WEIGHTED[prompt]
    assert [each.text.strip() for each in part] == [text.strip() for text, _ in expected]
    for fragment, (_, weight) in zip(part, expected, strict=True):
        assert fragment.weight == pytest.approx(weight, rel=1e-12)
    assert without_weights(prompt) == "".join(text for text, _ in expected)


def test_break_begins_a_new_part() -> None:
    parts = parse_prompt("a (red:1.3) apple BREAK on a BREAKFAST table")
    assert ["".join(each.text for each in part).strip() for part in parts] == [
        "a red apple",
        "on a BREAKFAST table",
    ]
    assert has_weights("a BREAK b") and not has_weights("a BREAKFAST b")


@pytest.mark.parametrize(
    ("prompt", "lesson"),
    [
        ("a (red apple", r"never closed; write \\\("),
        ("a [red apple", r"never closed; write \\\["),
        ("()1.3", "a weight of nothing"),
        ("(:1.3)", "a weight of nothing"),
        ("a)++ b", "closes nothing"),
        ("[red:blue:0.5] apple", "change the prompt while it is drawn"),
        ("[red|blue] apple", "change the prompt while it is drawn"),
        ("(red:-1)", "is below 0"),
        ("(red:1001)", "is beyond 1000"),
        ("(red)99999999999999999999999999", "is beyond 1000"),
        ("(a BREAK b:1.2)", "BREAK stands within"),
    ],
)
def test_what_cannot_be_weighed_is_one_line(prompt: str, lesson: str) -> None:
    with pytest.raises(PromptError, match=lesson) as error:
        parse_prompt(prompt)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


def embedded(bundle: Bundle, prompt: str) -> torch.Tensor:
    with torch.inference_mode():
        return bundle.text.encode_whole([prompt])[0]


@pytest.mark.parametrize(
    ("prompt", "same_as"),
    [
        ("a ((red)) apple", "a (red)1.21 apple"),
        ("a [red] apple", f"a (red){1 / 1.1} apple"),
        (r"a (red \(fruit\):1.3)", "a (red(fruit):1.3)".replace("(fruit)", r" \(fruit\)")),
    ],
)
def test_weights_of_both_kinds_are_the_same_to_the_encoder(
    bundle: Bundle, prompt: str, same_as: str
) -> None:
    torch.testing.assert_close(embedded(bundle, prompt), embedded(bundle, same_as))


def test_a_louder_word_is_between_the_empty_prompt_and_more_of_it(bundle: Bundle) -> None:
    """compel's law, by hand: the empty prompt, and the weight times what lies between."""
    plain, empty = embedded(bundle, "red"), embedded(bundle, "")
    louder = embedded(bundle, "(red:1.5)")
    changed = (louder - plain).abs().amax(-1)[0] > 0
    assert changed.sum() == 1  # the one token of the word
    torch.testing.assert_close(
        louder[0, changed], (empty + 1.5 * (plain - empty))[0, changed], atol=1e-5, rtol=1e-5
    )


def test_parts_between_breaks_are_chunks_of_their_own(bundle: Bundle) -> None:
    text = embedded(bundle, "a red apple BREAK a blue dog")
    pair = [embedded(bundle, part) for part in ("a red apple", "a blue dog")]
    torch.testing.assert_close(text, torch.cat(pair, dim=1))


def test_five_thousand_words_are_all_encoded(bundle: Bundle) -> None:
    """How long it takes is told by benchmarks/long_prompt.py."""
    prompt = " ".join(["red", "apple", "(blue:1.2)", "dog", "house,"] * 1000)
    text = embedded(bundle, prompt)
    assert text.shape[1] > 5000
    assert text.isfinite().all()


def test_500_damaged_prompts_are_read_or_refused(bundle: Bundle) -> None:
    rng = random.Random(0)
    pieces = [
        *"()[]:+-.\\\"'|<>{}1aé語🙂\n\t\x00",
        "red",
        "BREAK",
        ":1.3",
        "1e9",
        "and",
        ").blend(",
    ]
    refused = 0
    for _ in range(500):
        prompt = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 25)))
        try:
            parts = parse_prompt(prompt)
        except PromptError as error:
            refused += 1
            assert "\n" not in str(error).replace("\\n", "")
            continue
        for fragment in (each for part in parts for each in part):
            assert 0 <= fragment.weight < float("inf")
    assert 50 < refused < 450


@pytest.mark.slow
def test_200_damaged_prompts_are_encoded_or_refused(bundle: Bundle) -> None:
    rng = random.Random(1)
    pieces = [
        *'()[]:+-.\\"|<>1é語🙂\n',
        "red",
        " apple ",
        " BREAK ",
        ":1.3",
        ").blend(0.5)",
        ").and()",
    ]
    for _ in range(200):
        prompt = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 15)))
        try:
            assert embedded(bundle, prompt).isfinite().all()
        except PromptError:
            continue
