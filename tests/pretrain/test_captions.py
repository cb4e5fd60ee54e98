"""Captions: they say what they are given, and often less."""

from random import Random

import pytest

from twostep.evaluate.attributes import AttributeNameError, Attributes
from twostep.pretrain.captions import Omission, caption, complete_caption


def test_a_caption_says_everything_it_is_given() -> None:
    for seed in range(50):
        words = caption(Attributes(("red apple",), "3d", "blue"), Random(seed))
        assert all(part in words for part in ("red apple", "3d", "blue"))


def test_no_attributes_give_the_empty_caption() -> None:
    assert caption(Attributes(), Random(0)) == ""


def test_the_complete_caption_has_its_article() -> None:
    assert complete_caption("owl", "3d", "red") == "a 3d owl on a red background"
    assert complete_caption("owl", "flat", "orange") == "a flat owl on an orange background"


def test_omission_leaves_out_as_often_as_it_says() -> None:
    rng = Random(0)
    said = [Omission().apply(("owl",), "bird", "3d", "red", rng) for _ in range(4000)]
    share = sum(each == Attributes() for each in said) / len(said)
    assert 0.08 < share < 0.13
    assert any(each.names == ("bird",) for each in said)
    complete = sum(each == Attributes(("owl",), "3d", "red") for each in said) / len(said)
    assert 0.42 < complete < 0.54


def test_an_unknown_style_is_told() -> None:
    with pytest.raises(AttributeNameError, match="flat, 3d"):
        Attributes(("owl",), "cubist", None)
