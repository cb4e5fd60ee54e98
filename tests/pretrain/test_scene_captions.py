"""Captions of scenes: they say what they are given, and leave out as often as it is said."""

from random import Random

import pytest
import torch
from transformers import CLIPTokenizer

from twostep.evaluate.attributes import Concept, SceneAttributes, ThingAttributes
from twostep.pretrain.scene_captions import (
    SceneOmission,
    caption_table,
    complete_scene_caption,
    random_caption,
    scene_caption,
    scene_corpus,
)
from twostep.pretrain.scenes import random_scenes
from twostep.pretrain.tokenizer import build_tokenizer

FOX = ThingAttributes(("fox", "vixen"), "3d")
OWL = ThingAttributes(("owl",), "3d")
CONCEPTS = (
    Concept("fox", "mammal", ("fox", "vixen")),
    Concept("owl", "bird", ("owl",)),
    Concept("umbrella-on-ground", "", ("umbrella on ground",)),
)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer(scene_corpus(CONCEPTS), 32)


def test_one_thing_is_said_in_several_forms() -> None:
    said = SceneAttributes((FOX,), None, ("red", "red"))
    forms = {scene_caption(said, Random(seed), synonym=0.0) for seed in range(60)}
    assert forms == {
        "a 3d fox on a red background",
        "a 3d fox, red background",
        "a fox, 3d, red background",
        "a fox in 3d style on a red background",
        "a fox in 3d style, red background",
    }


def test_a_relation_is_said_from_either_side() -> None:
    beside = SceneAttributes((FOX, OWL), "left of")
    captions = {scene_caption(beside, Random(seed), synonym=0.0) for seed in range(99)}
    plain = {caption for caption in captions if caption.startswith("a 3d")}
    assert plain == {
        "a 3d fox to the left of a 3d owl",
        "a 3d fox left of a 3d owl",
        "a 3d owl to the right of a 3d fox",
        "a 3d owl right of a 3d fox",
    }
    assert "a fox left of an owl, 3d" in captions
    above = SceneAttributes((FOX, ThingAttributes(("owl",), "flat")), "above")
    captions = {scene_caption(above, Random(seed), synonym=0.0) for seed in range(20)}
    assert captions == {"a 3d fox above a flat owl", "a flat owl below a 3d fox"}


def test_no_attributes_give_the_empty_caption() -> None:
    assert scene_caption(SceneAttributes(), Random(0)) == ""


def test_the_complete_caption_names_both_colours_of_a_gradient() -> None:
    said = SceneAttributes((OWL, FOX), "above", ("orange", "black"))
    expected = "a 3d owl above a 3d fox on an orange to black background"
    assert complete_scene_caption(said) == expected


def test_omission_leaves_out_as_often_as_it_says() -> None:
    scenes = random_scenes(3, 4, count=1500, seed=0).scenes()
    rng = Random(0)
    said = [SceneOmission().apply(scene, CONCEPTS, rng) for scene in scenes]
    spoken = [(what, scene) for what, scene in zip(said, scenes, strict=True) if what.things]
    # Four standard deviations of shares of 1,500, and of their 750 pairs.
    assert 1 - len(spoken) / len(said) == pytest.approx(0.08, abs=0.028)
    no_style = [what.things[0].style is None for what, _ in spoken]
    assert sum(no_style) / len(spoken) == pytest.approx(0.2, abs=0.042)
    no_ground = [what.background is None for what, _ in spoken]
    assert sum(no_ground) / len(spoken) == pytest.approx(0.2, abs=0.042)
    pairs = [what.relation is None for what, scene in spoken if scene.relation]
    assert sum(pairs) / len(pairs) == pytest.approx(0.33, abs=0.07)
    kinds = [what.things[0].names[0] in ("mammal", "bird") for what, _ in spoken]
    # A third of the things have no kind.
    assert sum(kinds) / len(kinds) == pytest.approx(0.1 * 2 / 3, abs=0.027)


def test_what_is_said_is_true_of_the_scene() -> None:
    for scene in random_scenes(3, 4, count=200, seed=1).scenes():
        said = SceneOmission(kind_instead=0.0).apply(
            scene, CONCEPTS, Random(scene.things[0].concept)
        )
        shown = [CONCEPTS[thing.concept].names for thing in scene.things]
        if said.things and said.relation:
            assert [thing.names for thing in said.things] == shown
        elif said.things:
            assert sorted(thing.names for thing in said.things) == sorted(shown)
        assert said.relation in (None, scene.relation)


def test_a_table_holds_the_tokens_of_the_captions(tokenizer: CLIPTokenizer) -> None:
    table = random_scenes(3, 4, count=5, seed=0)
    tokens = caption_table(table, CONCEPTS, tokenizer, captions_per_scene=2, seed=7)
    rng = Random("captions/7")
    twice = [scene for scene in table.scenes() for _ in range(2)]
    captions = [random_caption(scene, CONCEPTS, rng, SceneOmission()) for scene in twice]
    assert tokens.shape == (5, 2, 32)
    for row, caption in zip(tokens.flatten(0, 1), captions, strict=True):
        ids = tokenizer(caption).input_ids
        assert row[: len(ids)].tolist() == ids
        assert (row[len(ids) :] == tokenizer.pad_token_id).all()


def test_every_word_of_a_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    words = "an umbrella on ground to the right of a twemoji vixen on a pink to gray background"
    ids = tokenizer(words).input_ids
    assert len(ids) == len(words.split()) + 2
    assert torch.tensor(ids).max() < 2**15  # tables hold 16 bits
