"""The scene judge, on scenes of the committed drawings: it finds what is there, nothing else."""

import pytest
import torch
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Concept
from twostep.evaluate.grounds import fit_grounds
from twostep.evaluate.judge import JudgeError
from twostep.evaluate.scene_judge import SceneJudge
from twostep.pretrain.degradation import Degradation, degrade
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.scenes import SceneTable, compose, random_scenes

NAMES = list(BACKGROUNDS)
MILD = Degradation(
    probability=1.0,
    largest_blur_pixels=2.0,
    largest_noise=0.08,
    largest_contrast_change=0.03,
    largest_brightness_shift=0.02,
)


@pytest.fixture(scope="module")
def scene_judge(emoji: DrawingSet) -> SceneJudge:
    return SceneJudge(emoji.drawings, emoji.concepts, STYLES)


@pytest.fixture(scope="module")
def table(emoji: DrawingSet) -> SceneTable:
    return random_scenes(len(emoji.concepts), 4, count=8, seed=3)


@pytest.fixture(scope="module")
def pictures(emoji: DrawingSet, table: SceneTable) -> Tensor:
    return compose(table, emoji.drawings, 256)


def _agrees(judge: SceneJudge, pictures: Tensor, table: SceneTable) -> list[bool]:
    """Tell of each picture whether everything seen on it is what was composed."""
    answers = []
    for sight, scene in zip(judge.look(pictures), table.scenes(), strict=True):
        seen = [(thing.concept, thing.style) for thing in sight.things]
        answers.append(
            seen == [(thing.concept, thing.style) for thing in scene.things]
            and sight.relation == scene.relation
            and sight.background == tuple(NAMES[number] for number in scene.background)
        )
    return answers


def test_it_sees_what_was_composed(
    scene_judge: SceneJudge, pictures: Tensor, table: SceneTable
) -> None:
    assert all(_agrees(scene_judge, pictures, table))


def test_boxes_are_where_things_were_laid(
    scene_judge: SceneJudge, pictures: Tensor, table: SceneTable
) -> None:
    for sight, scene in zip(scene_judge.look(pictures[:3]), table.scenes(), strict=False):
        for seen, laid in zip(sight.things, scene.things, strict=True):
            assert seen.box.left == pytest.approx(laid.box.left, abs=0.005)
            assert seen.box.top == pytest.approx(laid.box.top, abs=0.005)
            assert seen.box.side == pytest.approx(laid.box.side, abs=0.005)
            assert seen.likeness > 0.9


@pytest.mark.slow
def test_mild_damage_changes_nothing(emoji: DrawingSet, scene_judge: SceneJudge) -> None:
    table = random_scenes(len(emoji.concepts), 4, count=64, seed=4)
    generator = torch.Generator().manual_seed(0)
    damaged, _ = degrade(compose(table, emoji.drawings, 256), MILD, generator)
    assert sum(_agrees(scene_judge, damaged, table)) >= 62


def test_noise_and_bare_grounds_show_nothing(scene_judge: SceneJudge) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 256, 256, generator=generator).clamp(-1, 1)
    bare = torch.full((1, 3, 256, 256), 0.3)
    assert [sight.things for sight in scene_judge.look(torch.cat([noise, bare]))] == [(), (), ()]


def test_what_it_does_not_know_is_not_there(emoji: DrawingSet, pictures: Tensor, table) -> None:
    """Without a thing among its drawings the judge sees nothing, or a poor likeness."""
    number = int(table.concepts[0, 0])
    others = [each for each in range(len(emoji.concepts)) if each != number]
    concepts = tuple(emoji.concepts[each] for each in others)
    ignorant = SceneJudge(emoji.drawings[others], concepts, STYLES)
    (sight,) = ignorant.look(pictures[:1])
    assert all(thing.likeness < 0.85 for thing in sight.things)


def test_drawings_that_look_alike_are_all_named(emoji: DrawingSet, table, pictures) -> None:
    number = int(table.concepts[0, 0])
    twice = torch.cat([emoji.drawings, emoji.drawings[number, None]])
    concepts = (*emoji.concepts, Concept("twin", "", ("twin",)))
    (sight,) = SceneJudge(twice, concepts, STYLES).look(pictures[:1])
    twin = len(emoji.concepts)
    style = int(table.styles[0, 0])
    assert {(number, style), (twin, style)} <= sight.things[0].alike


def test_pictures_of_another_size_are_refused(scene_judge: SceneJudge) -> None:
    with pytest.raises(JudgeError, match="256"):
        scene_judge.look(torch.zeros(1, 3, 64, 64))


def test_a_ground_is_read_beneath_things_that_touch_the_border() -> None:
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    down = torch.linspace(0, 1, 64)[:, None]
    gradient = torch.lerp(colours[0][:, None, None], colours[5][:, None, None], down)
    picture = gradient.expand(3, 64, 64).clone()
    picture[:, 20:50, :10] = 1.0
    picture[:, :3, 30:50] = -1.0
    grounds = fit_grounds(picture[None])
    torch.testing.assert_close(grounds.top[0], colours[0], atol=0.02, rtol=0)
    torch.testing.assert_close(grounds.bottom[0], colours[5], atol=0.02, rtol=0)
    assert grounds.names() == [("red", "blue")]


def test_a_colour_between_two_is_none_that_exists() -> None:
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    between = (colours[0] + colours[5]) / 2
    picture = between[None, :, None, None].expand(1, 3, 64, 64)
    assert fit_grounds(picture).names() == [(None, None)]
