"""Figures of sets of clips, on real drawings that move."""

import pytest
import torch

from twostep.evaluate.clip_scores import AskedClip, score_clips
from twostep.evaluate.judge import load_judge
from twostep.evaluate.measurements import EvaluationError
from twostep.pretrain.clips import animate, random_paths
from twostep.pretrain.drawings import load_drawings

KINDS = ("left", "spin", "grow", "still")


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module")
def clips(judge):
    """Return 16 clips of 4 frames, and what is on them."""
    drawings = load_drawings()
    kinds = list(KINDS) * 4
    paths = random_paths(kinds, 4, torch.Generator().manual_seed(0))
    numbers = torch.arange(16) * 7
    moving = animate(
        drawings.drawings[numbers, 1], torch.arange(16) % 12, paths, pixels=judge.pixels
    )
    asked = [
        AskedClip(kind, drawings.concepts[number].names[0])
        for kind, number in zip(kinds, numbers.tolist(), strict=True)
    ]
    return moving, asked


def test_the_same_clips_are_at_no_distance(judge, clips) -> None:
    moving, asked = clips
    report = score_clips(moving, asked, judge, reference=moving)
    assert report.num_clips == 16 and report.motion_ratio == 1
    assert report.frechet_frames == pytest.approx(0, abs=1e-6)
    assert report.frechet_changes == pytest.approx(0, abs=1e-6)
    # Small ones beside the middle, and those that stand on their heads.
    assert report.concept is not None and report.concept > 0.8
    assert report.motion_by_kind["still"] == 1
    assert set(report.to_dict()) >= {"motion", "motion_ratio", "frechet_changes"}


def test_intervals_are_over_clips(judge, clips) -> None:
    moving, asked = clips
    # Another clip in the place of each of the last four.
    changed = torch.cat([moving[:12], moving[:4]])
    report = score_clips(changed, asked, judge, reference=moving)
    for name, (low, high) in report.intervals.items():
        assert low <= getattr(report, name) <= high, name
    assert set(report.intervals) == {
        "motion",
        "concept",
        "motion_amount",
        "motion_ratio",
        "frechet_frames",
        "frechet_changes",
    }
    low, high = report.intervals["frechet_frames"]
    assert low < report.frechet_frames < high
    same = score_clips(moving, asked, judge, reference=moving)
    # Ratios to oneself do not vary, whatever the prompts.
    assert same.intervals["motion_ratio"] == (1, 1)
    # One with others than its own prompts' has no ratio of pairs to resample.
    fewer = score_clips(moving, asked, judge, reference=moving[:8])
    assert fewer.intervals["motion_ratio"] == (None, None)
    # And the fewer others there are, the less sure is how far they are: the same three six times
    # lie where the three do.
    few = score_clips(moving, asked, judge, reference=moving[:3])
    many = score_clips(moving, asked, judge, reference=moving[:3].repeat(6, 1, 1, 1, 1))
    assert _width(few, "frechet_changes") > 1.2 * _width(many, "frechet_changes")


def _width(report, name):
    low, high = report.intervals[name]
    return high - low


def test_frozen_clips_are_near_in_frames_and_far_in_changes(judge, clips) -> None:
    """What few-step video loses: every frame is right, and nothing moves."""
    moving, asked = clips
    frozen = moving[:, :, 1:2].expand_as(moving)
    report = score_clips(frozen, asked, judge, reference=moving)
    backwards = score_clips(moving.flip(2), asked, judge, reference=moving)
    assert report.motion_ratio == 0 and report.motion == pytest.approx(0.25)
    assert backwards.frechet_frames == pytest.approx(0, abs=1e-6)
    assert report.frechet_changes > 10 * backwards.frechet_changes >= 0
    assert backwards.motion_ratio == pytest.approx(1)
    assert backwards.motion_by_kind["left"] == 0 == backwards.motion_by_kind["grow"]


def test_concepts_are_counted_in_every_frame(judge, clips) -> None:
    moving, asked = clips
    wrong = [AskedClip(each.kind, asked[i - 1].concept) for i, each in enumerate(asked)]
    assert score_clips(moving, wrong, judge).concept < 0.1
    unsaid = [AskedClip(each.kind) for each in asked]
    assert score_clips(moving, unsaid, judge).concept is None


def test_bad_sets_are_refused(judge, clips) -> None:
    moving, asked = clips
    with pytest.raises(EvaluationError, match="16 clips and what 15"):
        score_clips(moving, asked[1:], judge)
    with pytest.raises(EvaluationError, match="4 frames of 64x64 pixels and the reference's are 3"):
        score_clips(moving, asked, judge, reference=moving[:, :, 1:])
    with pytest.raises(EvaluationError, match="knows no 'hovercraft'"):
        score_clips(moving, [AskedClip("left", "hovercraft")] * 16, judge)
