"""Prompts of scenes are read back into what they were written from."""

from random import Random

import pytest

from twostep.evaluate.attributes import STYLES, Concept, SceneAttributes, ThingAttributes
from twostep.evaluate.prompts import ScenePromptReader
from twostep.pretrain.drawings import built_in_concepts
from twostep.pretrain.scene_captions import SceneOmission, complete_scene_caption, scene_caption
from twostep.pretrain.scene_prompt_sets import scene_tasks
from twostep.pretrain.scenes import random_scenes
from twostep.pretrain.vectors import MINI

CONCEPTS = built_in_concepts(MINI)
FEW = (
    Concept("fox", "mammal", ("fox", "vixen")),
    Concept("hammer-and-pick", "tool", ("hammer and pick",)),
    Concept("tilted-left", "", ("magnifying glass tilted left",)),
)
FOX = ThingAttributes(("fox", "vixen"))
HAMMER = ThingAttributes(("hammer and pick",))
GLASS = ThingAttributes(("magnifying glass tilted left",))


@pytest.fixture(scope="module")
def reader() -> ScenePromptReader:
    return ScenePromptReader(CONCEPTS)


def test_what_captions_say_is_read_back(reader: ScenePromptReader) -> None:
    for number, scene in enumerate(random_scenes(991, 4, count=250, seed=5).scenes()):
        rng = Random(number)
        said = SceneOmission(relation=0.0).apply(scene, CONCEPTS, rng)
        caption = scene_caption(said, rng, synonym=0.3)
        assert reader.read(caption) == said, caption


def test_every_name_is_read_as_its_thing_in_every_style(reader: ScenePromptReader) -> None:
    for number, concept in enumerate(CONCEPTS):
        said = SceneAttributes((ThingAttributes(concept.names, STYLES[number % 4]),))
        assert reader.read(complete_scene_caption(said)) == said
        bare = SceneAttributes((ThingAttributes(concept.names),))
        assert reader.read(concept.names[-1]) == bare


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", SceneAttributes()),
        ("A  Fox", SceneAttributes((FOX,))),
        ("a vixen and a hammer and pick", SceneAttributes((FOX, HAMMER))),
        ("a hammer and pick and a fox", SceneAttributes((HAMMER, FOX))),
        ("a magnifying glass tilted left left of a fox", SceneAttributes((GLASS, FOX), "left of")),
        ("a fox right of a hammer and pick", SceneAttributes((HAMMER, FOX), "left of")),
        ("a fox below a tool", SceneAttributes((ThingAttributes(("tool",)), FOX), "above")),
        (
            "a fox above a hammer and pick in noto style on an orange to red background",
            SceneAttributes(
                (
                    ThingAttributes(FOX.names, "noto"),
                    ThingAttributes(HAMMER.names, "noto"),
                ),
                "above",
                ("orange", "red"),
            ),
        ),
    ],
)
def test_forms(prompt: str, expected: SceneAttributes) -> None:
    assert ScenePromptReader(FEW).read(prompt) == expected


@pytest.mark.parametrize(
    "prompt", ["a dragon", "a fox behind a fox", "a fox and", "a cubist fox", "a flat fox, 3d"]
)
def test_what_is_no_scene_of_these_things_is_not_read(prompt: str) -> None:
    assert ScenePromptReader(FEW).read(prompt) is None


def test_the_prompts_of_the_evaluation_are_different_and_say_what_they_mean(
    reader: ScenePromptReader,
) -> None:
    tasks = scene_tasks(CONCEPTS)
    assert len({task.prompt for task in tasks}) == len({task.seed for task in tasks}) == 1024
    shown = {thing.concept for task in tasks for thing in task.scene.things}
    assert shown == set(range(991))
    pairs = [task for task in tasks if len(task.scene.things) == 2]
    related = sum(task.attributes.relation is not None for task in pairs)
    assert 480 < len(pairs) < 544
    assert related == pytest.approx(len(pairs) * 2 / 3, abs=1)
    for task in tasks[::7]:
        assert reader.read(task.prompt) == task.attributes
        names = [CONCEPTS[thing.concept].names for thing in task.scene.things]
        assert [thing.names for thing in task.attributes.things] == names
        assert task.attributes.relation in (None, task.scene.relation)


def test_the_prompts_stay_what_they_are() -> None:
    assert [task.prompt for task in scene_tasks(CONCEPTS, 3)] == [
        "a noto 1st place medal on a white background",
        "a twemoji office building to the left of a twemoji department store on a blue background",
        "a twemoji squid on a yellow to red background",
    ]
