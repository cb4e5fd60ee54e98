"""Moving drawings: latents, captions, and which picture model an item is for."""

import random

import pytest
import torch

from twostep.evaluate.motions import MOTIONS
from twostep.evaluate.tracking import motion_figures, motion_kinds, track
from twostep.formats.motion_files import MotionConfig
from twostep.models.motion import load_pictures, motion_contract, with_motion
from twostep.networks.motion import MotionModule
from twostep.pretrain.clips import (
    MovingDrawings,
    animate,
    moving_caption,
    moving_drawings,
    random_paths,
    walked_drawings,
)
from twostep.pretrain.drawings import load_drawings
from twostep.training.recipe import RecipeError


@pytest.fixture(scope="module")
def teacher():
    """Return nano with a fresh motion module, as if it were two picture models."""
    (picture,) = load_pictures(["nano"])
    shape = MotionConfig.on(picture.denoiser.network.config)
    contract = motion_contract(picture.contract, "clips", recipe="none", version="0")
    return with_motion([picture, picture], MotionModule(shape), contract, frames=8)


def test_latents_are_of_the_clips_that_captions_name(teacher) -> None:
    clips = MovingDrawings(load_drawings(), teacher, kinds=("left", "grow", "still"))
    tensors = torch.Generator().manual_seed(0)
    composed, labels = clips.compose(6, tensors)
    assert composed.shape == (6, 3, 8, 64, 64)
    assert motion_kinds(motion_figures(track(composed))) == [each.kind for each in labels]
    latents, captions = clips.draw(6, torch.Generator().manual_seed(0), random.Random(0))
    assert latents.shape == (6, 4, 8, 16, 16)
    assert torch.allclose(latents, teacher.codec.encode(composed), atol=1e-5)
    words = {"left": ("left",), "grow": ("growing", "larger"), "still": ()}
    for caption, label in zip(captions, labels, strict=True):
        others = [word for kind in words for word in words[kind] if kind != label.kind]
        assert not any(word in caption for word in others)
        if caption and label.kind != "still":
            assert any(caption.endswith(word) for word in words[label.kind])


def test_motion_survives_the_autoencoder(teacher) -> None:
    """The tracker is right on what the codec makes of clips too, as it must be on drawn ones."""
    clips = MovingDrawings(load_drawings(), teacher)
    composed, labels = clips.compose(36, torch.Generator().manual_seed(5))
    again = teacher.codec.decode(teacher.codec.encode(composed))
    kinds = motion_kinds(motion_figures(track(again)))
    right = sum(kind == label.kind for kind, label in zip(kinds, labels, strict=True))
    assert right >= 34


def test_source_shares_items_out_to_the_picture_models(teacher, tmp_path) -> None:
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    firsts = set()
    for seed in range(6):
        _, conditioning = source.draw(3, torch.Generator().manual_seed(seed), random.Random(seed))
        assert conditioning.variants in ((0, 1, 0), (1, 0, 1))
        firsts.add(conditioning.variants[0])
        assert source.empty(conditioning).variants == conditioning.variants
    assert firsts == {0, 1}


def test_walks_to_the_drawings_are_shared_out_to_the_picture_models(teacher, tmp_path) -> None:
    source = walked_drawings(teacher, tmp_path, lambda *_: None, count=3, steps=1, sampler="euler")
    assert source.walks.shape == (3, 2, 4, 8, 16, 16) and source.times == (1000, 0)
    moving = MovingDrawings(load_drawings(), teacher)
    assert [item.prompt for item in source.items] == moving.captions(3, 900_000)
    # Three are the first of five, so walks to them stay good.
    assert moving.captions(5, 900_000)[:3] == moving.captions(3, 900_000)
    assert len(set(moving.captions(5, 900_000))) > 1
    assert [item.variant for item in source.items] == [0, 1, 0]
    walks = source.draw_walks(8, torch.Generator().manual_seed(0), random.Random(0))
    assert set(walks.conditioning.variants) == {0, 1}


def test_captions_end_with_the_motion() -> None:
    words = random.Random(0)
    assert moving_caption("a fox", "still", words) == "a fox"
    assert moving_caption("", "left", words) == ""
    said = {moving_caption("a fox", "left", words) for _ in range(40)}
    assert said == {"a fox, moving left", "a fox, going left"}


def test_paths_are_those_of_their_kinds() -> None:
    kinds = list(MOTIONS)
    paths = random_paths(kinds, 16, torch.Generator().manual_seed(0))
    moved = paths.centre[:, -1] - paths.centre[:, 0]
    left, spin, grow, bounce = (kinds.index(kind) for kind in ("left", "spin", "grow", "bounce"))
    assert -0.3 * 1.25 <= moved[left, 0] <= -0.3 * 0.75 and moved[left, 1] == 0
    assert paths.angle[spin, 8] - paths.angle[spin, 0] == pytest.approx(torch.pi, abs=1e-5)
    assert 1.8**0.75 <= paths.scale[grow, -1] / paths.scale[grow, 0] <= 1.8**1.25
    heights = paths.centre[bounce, :, 1]
    assert 0.75 * 0.25 * 0.95 <= heights.max() - heights.min() <= 1.25 * 0.25
    assert torch.isfinite(random_paths(["left"], 1, torch.Generator()).centre).all()


def test_kinds_together_differ_in_nothing_else(teacher) -> None:
    clips = MovingDrawings(load_drawings(), teacher, together=True)
    kinds = list(MOTIONS)
    composed, labels = clips.compose(18, torch.Generator().manual_seed(1))
    assert [each.kind for each in labels] == 2 * kinds
    for group in (labels[:9], labels[9:]):
        assert len({(each.concept, each.style, each.background) for each in group}) == 1
    assert motion_kinds(motion_figures(track(composed))) == 2 * kinds
    paths = random_paths(2 * kinds, 8, torch.Generator().manual_seed(1), alike=9)
    moved = paths.centre[:, -1] - paths.centre[:, 0]
    left, right = kinds.index("left"), kinds.index("right")
    assert moved[left, 0] == -moved[right, 0] != -moved[9 + right, 0]
    _, captions, said = clips.draw_frames(
        90, torch.Generator().manual_seed(2), random.Random(3), torch.tensor([0])
    )
    assert said == 10 * kinds
    for place in range(0, 90, 9):
        pictures = {caption.rpartition(", ")[0] for caption in captions[place + 1 : place + 9]}
        assert pictures == {captions[place]} or not any(captions[place : place + 9])
    with pytest.raises(RecipeError, match="multiple of 9"):
        clips.compose(10, torch.Generator())


def test_some_frames_of_a_clip_are_those_of_the_whole(teacher) -> None:
    clips = MovingDrawings(load_drawings(), teacher)
    whole, labels = clips.compose(3, torch.Generator().manual_seed(4))
    some, same = clips.compose(3, torch.Generator().manual_seed(4), torch.tensor([1, 6]))
    assert same == labels
    assert torch.allclose(some, whole[:, :, [1, 6]], atol=1e-6)


def test_clips_are_composed_where_the_drawings_are() -> None:
    """Not on the CPU: there a GPU would wait for every batch. Whatever mixes devices fails here."""
    somewhere = torch.device("meta")
    drawings = torch.zeros(2, 4, 32, 32, dtype=torch.uint8, device=somewhere)
    paths = random_paths(["left", "spin"], 4, torch.Generator()).to(somewhere)
    clips = animate(drawings, torch.tensor([0, 5]).to(somewhere), paths, pixels=16)
    assert clips.shape == (2, 3, 4, 16, 16) and clips.device == somewhere
