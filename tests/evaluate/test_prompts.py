"""The fixed evaluation prompts, and reading prompts back."""

from random import Random

import pytest

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Attributes
from twostep.evaluate.judge import Judge
from twostep.evaluate.prompts import attributes_from_prompt
from twostep.pretrain.captions import Omission, caption, complete_caption
from twostep.pretrain.drawings import DrawingSet, built_in_concepts
from twostep.pretrain.prompt_sets import (
    FIRST_SEED,
    PromptError,
    complete_tasks,
    incomplete_tasks,
    real_pictures,
    repeated_tasks,
)

CONCEPTS = built_in_concepts()


def test_every_caption_is_read_back_as_it_was_meant():
    for seed in range(3000):
        rng = Random(seed)
        concept = rng.choice(CONCEPTS)
        style, background = rng.choice(list(STYLES)), rng.choice(list(BACKGROUNDS))
        meant = Omission(everything=0.05).apply(
            concept.names, concept.subgroup, style, background, rng
        )
        prompt = caption(meant, rng)
        assert attributes_from_prompt(prompt, CONCEPTS) == meant, prompt


@pytest.mark.parametrize(
    "prompt", ["a 3d red apple on a red background", "  A 3D  Red Apple on a red background "]
)
def test_a_colour_in_the_name_is_no_background(prompt: str):
    assert attributes_from_prompt(prompt, CONCEPTS) == Attributes(("red apple",), "3d", "red")
    assert attributes_from_prompt("a red apple", CONCEPTS) == Attributes(("red apple",))


def test_a_synonym_stands_for_its_concept():
    wish = attributes_from_prompt("a noto donut on an orange background", CONCEPTS)
    assert wish is not None
    assert wish.names[0] == "doughnut"


@pytest.mark.parametrize(
    "prompt", ["a flat dragon on a blue background", "fox fox", "a watercolour fox"]
)
def test_what_is_no_concept_is_unknown(prompt: str):
    assert attributes_from_prompt(prompt, CONCEPTS) is None


def test_complete_prompts_are_many_different_and_balanced():
    tasks = complete_tasks(CONCEPTS)
    assert len({task.prompt for task in tasks}) == len(tasks) == 1024
    assert len({task.seed for task in tasks}) == 1024
    assert min(task.seed for task in tasks) == FIRST_SEED
    for concept in CONCEPTS:
        wishes = [task.attributes for task in tasks if task.attributes.names == concept.names]
        assert {wish.style for wish in wishes} == set(STYLES)
        assert len({wish.background for wish in wishes}) >= 4
    assert {task.attributes.background for task in tasks} == set(BACKGROUNDS)


def test_all_that_few_concepts_give_is_given_once(emoji: DrawingSet):
    most = len(emoji.concepts) * len(STYLES) * len(BACKGROUNDS)
    assert len({task.prompt for task in complete_tasks(emoji.concepts, most)}) == most
    with pytest.raises(PromptError, match=str(most)):
        complete_tasks(emoji.concepts, most + 1)


def test_prompts_of_one_kind_come_with_four_seeds_each():
    for tasks in (repeated_tasks(CONCEPTS), incomplete_tasks(CONCEPTS)):
        assert len(tasks) == 256
        assert len({task.attributes for task in tasks}) == 64
        assert len({task.seed for task in tasks}) == 256
        assert all(
            len({task.prompt for task in tasks[start : start + 4]}) == 1
            for start in range(0, 256, 4)
        )


def test_no_seed_is_used_for_two_pictures():
    tasks = [*complete_tasks(CONCEPTS), *repeated_tasks(CONCEPTS), *incomplete_tasks(CONCEPTS)]
    assert len({task.seed for task in tasks}) == len(tasks)


def test_incomplete_prompts_leave_something_open_in_every_way():
    wishes = {task.attributes for task in incomplete_tasks(CONCEPTS)}
    usual = {concept.names for concept in CONCEPTS}
    kinds = {
        (bool(w.names), w.names in usual, w.style is None, w.background is None) for w in wishes
    }
    assert Attributes() in wishes
    assert len(kinds) == 11
    assert all(w.names not in usual or None in (w.style, w.background) for w in wishes)


def test_tasks_can_be_read_back():
    for task in [*complete_tasks(CONCEPTS), *incomplete_tasks(CONCEPTS)]:
        assert attributes_from_prompt(task.prompt, CONCEPTS) == task.attributes


def test_real_pictures_answer_their_prompts(emoji: DrawingSet, judge: Judge):
    from twostep.evaluate.metrics import evaluate

    wishes = [task.attributes for task in complete_tasks(emoji.concepts, 128)]
    report = evaluate(real_pictures(wishes, emoji), wishes, judge)
    assert report.concept.share is not None
    assert report.concept.share > 0.98


def test_real_pictures_of_another_set_are_refused(emoji: DrawingSet):
    with pytest.raises(PromptError, match="penguin"):
        real_pictures([Attributes(("penguin",))], emoji)


def test_the_plain_caption_is_the_one_of_evaluation():
    assert complete_tasks(CONCEPTS)[0].prompt == complete_caption("fox", "flat", "red")
