"""Measures of motion on clips whose motion is known exactly."""

import math

import pytest
import torch

from twostep.evaluate.motions import MOTIONS, MotionNameError, find_motion
from twostep.evaluate.tracking import (
    TrackingError,
    agreement,
    foreground,
    motion_amount,
    motion_figures,
    motion_kinds,
    motion_ratio,
    track,
)
from twostep.pretrain.clips import Paths, animate, random_paths
from twostep.pretrain.drawings import load_drawings, random_backgrounds

FRAMES = 8


@pytest.fixture(scope="module")
def drawings():
    return load_drawings()


def still_paths(count=1, frames=FRAMES, scale=0.6):
    return Paths(
        torch.zeros(count, frames, 2),
        torch.zeros(count, frames),
        torch.full((count, frames), scale),
    )


def fox_along(drawings, paths):
    """Move the 3d fox, which is alike from no two sides, on blue."""
    icon = next(n for n, each in enumerate(drawings.concepts) if "fox" in each.names)
    fox = drawings.drawings[icon, 1][None]
    return animate(fox, torch.tensor([5]), paths, pixels=64)


def test_displacement_is_the_one_that_was_drawn(drawings) -> None:
    paths = still_paths()
    paths.centre[0, :, 0] = torch.linspace(-0.15, 0.15, FRAMES)
    paths.centre[0, :, 1] = torch.linspace(0.05, -0.05, FRAMES)
    figures = motion_figures(track(fox_along(drawings, paths)))
    assert figures.right.item() == pytest.approx(0.30, abs=0.01)
    assert figures.down.item() == pytest.approx(-0.10, abs=0.01)
    assert figures.turns.item() == pytest.approx(0, abs=0.01)
    assert figures.growth.item() == pytest.approx(0, abs=0.03)
    assert figures.bounce.item() == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("direction", [1, -1])
def test_turns_are_those_that_were_drawn(drawings, direction) -> None:
    paths = still_paths()
    paths.angle[0] = direction * 2 * math.pi * torch.arange(FRAMES) / FRAMES
    figures = motion_figures(track(fox_along(drawings, paths)))
    # Seven of eight steps of a turn lie between the frames.
    assert figures.turns.item() == pytest.approx(direction * 7 / 8, abs=0.04)


def test_growth_is_the_one_that_was_drawn(drawings) -> None:
    paths = still_paths()
    paths.scale[0] = 0.6 * torch.linspace(-0.3, 0.3, FRAMES).exp()
    figures = motion_figures(track(fox_along(drawings, paths)))
    assert figures.growth.item() == pytest.approx(0.6, abs=0.04)


def test_a_turn_is_clockwise_as_it_is_seen(drawings) -> None:
    """A quarter turn of the drawing is that of Pillow's to the right."""
    paths = still_paths(frames=2)
    paths.angle[0, 1] = math.pi / 2
    first, second = fox_along(drawings, paths)[0].transpose(0, 1)
    turned = torch.rot90(first, k=-1, dims=(1, 2))
    assert (turned - second).abs().mean() < 0.02 < (first - second).abs().mean()


@pytest.mark.parametrize("frames", [8, 16])
def test_kinds_are_told_apart_on_real_drawings(drawings, frames) -> None:
    """What docs/video.md states: of 180 random clips, at least 97 in 100."""
    kinds = list(MOTIONS) * 20
    generator = torch.Generator().manual_seed(3)
    paths = random_paths(kinds, frames, generator)
    concept = torch.randint(len(drawings.concepts), (len(kinds),), generator=generator)
    style = torch.randint(4, (len(kinds),), generator=generator)
    background = random_backgrounds(len(kinds), generator)
    clips = animate(drawings.drawings[concept, style], background, paths, pixels=64)
    assert agreement(motion_kinds(motion_figures(track(clips))), kinds) >= 0.97


def test_motion_ratio_is_that_of_the_changes(drawings) -> None:
    fast = still_paths()
    fast.centre[0, :, 0] = torch.linspace(-0.15, 0.15, FRAMES)
    moving = fox_along(drawings, fast)
    frozen = moving[:, :, :1].expand_as(moving)
    assert motion_ratio(moving, moving) == 1
    assert motion_ratio(frozen, moving) == 0
    half = torch.cat([moving, frozen])
    assert motion_ratio(half, torch.cat([moving, moving])) == pytest.approx(0.5)
    # A picture that is brighter by 0.1 in every frame.
    ramp = torch.arange(4).view(1, 1, 4, 1, 1).expand(1, 3, 4, 8, 8) * 0.1
    assert motion_amount(ramp).item() == pytest.approx(0.1)
    with pytest.raises(TrackingError, match="stand still"):
        motion_ratio(moving, frozen)


def test_empty_frames_are_still(drawings) -> None:
    clips = torch.zeros(2, 3, 4, 16, 16)
    tracks = track(clips)
    assert float(tracks.share.max()) == 0 and float(tracks.centre.abs().max()) == 0
    assert motion_kinds(motion_figures(tracks)) == ["still", "still"]
    picture = fox_along(drawings, still_paths())[0, :, 0]
    assert 0.1 < float(foreground(picture[None]).mean()) < 0.4


def test_bad_input_is_refused() -> None:
    with pytest.raises(TrackingError, match="at least two frames"):
        track(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(TrackingError, match="2 clips cannot be compared with 1"):
        agreement(["left", "right"], ["left"])
    with pytest.raises(MotionNameError, match="'hover' is none of still, left"):
        find_motion("hover")
