"""Figures of a set of clips: do they move as they were asked to, show what they were asked to, and
how far are they from others.

Takes finished clips, what each was asked to show, and a judge of pictures; it does not know what
drew them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.evaluate.bootstrap import Estimate, Resamples
from twostep.evaluate.frechet import fit_features, frechet_distance, frechet_influences
from twostep.evaluate.judge import Judge
from twostep.evaluate.measurements import EvaluationError
from twostep.evaluate.motions import MOTIONS
from twostep.evaluate.tracking import (
    Tracks,
    agreement,
    aligned,
    motion_amount,
    motion_figures,
    motion_kinds,
    motion_ratio,
    track,
)

Clips = Float[Tensor, "clips 3 frames height width"]

_SIZE = 0.25
"""Of drawings as the judge knows them, by `Tracks.size`: of 0.18 to 0.28, what it knows best."""

_ANGLES = tuple(2 * math.pi * number / 12 for number in range(12))
"""In radians, of what may stand on its head."""


@dataclass(frozen=True)
class AskedClip:
    """What a clip was asked to show.

    Attributes:
        kind: of motion, by its name in `motions.MOTIONS`.
        concept: its usual name; None where the prompt does not say it.
    """

    kind: str
    concept: str | None = None


@dataclass(frozen=True)
class ClipReport:
    """The figures of one set of clips.

    Attributes:
        num_clips: in the set.
        motion: share of the clips whose tracked motion is of the kind that was asked for.
        motion_by_kind: the same of each kind.
        concept: share of the frames in which the judge sees the concept that was asked for, of
            clips whose prompts name one; None where none does. The judge knows drawings that fill
            a picture, so they are brought to its middle and to one size before; where spinning was
            asked for, it is asked in twelve orientations, of which the surest counts.
        motion_amount: mean absolute change from frame to frame, of clips in -1..1.
        motion_ratio: that amount over the reference's; None without a reference.
        frechet_frames: Frechet distance to the reference in the judge's features of frames.
        frechet_changes: the same of the differences of these from frame to frame, which do not
            depend on what is shown but on how it moves.
        intervals: by the names of the figures above, the 95 % interval over clips.
    """

    num_clips: int
    motion: float
    motion_by_kind: dict[str, float]
    motion_amount: float
    concept: float | None = None
    motion_ratio: float | None = None
    frechet_frames: float | None = None
    frechet_changes: float | None = None
    intervals: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by their names, for JSON."""
        return asdict(self)


def score_clips(
    clips: Clips,
    asked: Sequence[AskedClip],
    judge: Judge,
    *,
    reference: Float[Tensor, "others 3 _ _ _"] | None = None,
) -> ClipReport:
    """Measure clips.

    Args:
        clips: in -1..1, with frames of the judge's size.
        asked: what each was asked to show.
        judge: names what frames show, and gives features.
        reference: clips to compare with, usually the teacher's of the same prompts and noise.

    Raises:
        EvaluationError: there are not as many clips as wishes, or the reference has other frames.
        TrackingError: the clips have a single frame, or the reference does not move.
        JudgeError: the frames cannot be judged.
    """
    if len(clips) != len(asked):
        raise EvaluationError(
            f"got {len(clips)} clips and what {len(asked)} were asked to show; give one per clip."
        )
    if reference is not None and reference.shape[2:] != clips.shape[2:]:
        raise EvaluationError(
            f"the clips are {_in_words(clips)} and the reference's are {_in_words(reference)}; "
            "compare clips of one length and size."
        )
    tracks = track(clips)
    kinds = motion_kinds(motion_figures(tracks))
    wanted = [each.kind for each in asked]
    shown: dict[str, list[str]] = {}
    for found, kind in zip(kinds, wanted, strict=True):
        shown.setdefault(kind, []).append(found)
    right = torch.tensor([float(a == b) for a, b in zip(kinds, wanted, strict=True)])
    amounts = motion_amount(clips)
    resamples = Resamples(range(len(clips)))
    estimates = {"motion": resamples.mean(right), "motion_amount": resamples.mean(amounts)}
    concepts = _concept_shares(clips, tracks, asked, judge)
    if concepts is not None:
        estimates["concept"] = Resamples(range(len(concepts))).mean(concepts)
    if reference is not None:
        features, others = _features(clips, judge), _features(reference, judge)
        estimates["frechet_frames"] = _distance(features, others)
        estimates["frechet_changes"] = _distance(_changes(features), _changes(others))
        estimates["motion_ratio"] = _ratio(clips, reference, amounts, resamples)
    return ClipReport(
        num_clips=len(clips),
        motion_by_kind={
            kind: agreement(found, [kind] * len(found)) for kind, found in shown.items()
        },
        intervals={name: (each.low, each.high) for name, each in estimates.items()},
        **{name: each.value for name, each in estimates.items()},
    )


def _features(clips: Clips, judge: Judge) -> Float[Tensor, "clips frames features"]:
    frames = clips.transpose(1, 2).flatten(0, 1).to(judge.device)
    verdict = judge.judge(frames)
    features: Tensor = verdict.features.cpu().unflatten(0, (-1, clips.shape[2]))
    return features


def _changes(
    features: Float[Tensor, "clips frames features"],
) -> Float[Tensor, "clips changes features"]:
    """Return the differences from frame to frame."""
    return features[:, 1:] - features[:, :-1]


def _ratio(
    clips: Clips,
    reference: Float[Tensor, "others 3 _ _ _"],
    amounts: Float[Tensor, " clips"],
    resamples: Resamples,
) -> Estimate:
    """Return the motion ratio; its interval only if the reference is of the same prompts."""
    value = motion_ratio(clips, reference)
    if len(reference) != len(clips):
        return Estimate(value, None, None)
    return resamples.ratio(amounts, motion_amount(reference))


def _distance(
    ours: Float[Tensor, "clips frames features"], theirs: Float[Tensor, "others frames features"]
) -> Estimate:
    """Return a Frechet distance; as many others are clips of the same prompts, drawn together."""
    a, b = ours.flatten(0, 1), theirs.flatten(0, 1)
    value = frechet_distance(fit_features(a), fit_features(b))
    others = None if len(theirs) == len(ours) else Resamples(_clips_of_frames(theirs), seed=1)
    resamples = Resamples(_clips_of_frames(ours))
    return resamples.moved_by_both(value, *frechet_influences(a, b), others)


def _clips_of_frames(features: Float[Tensor, "clips frames features"]) -> list[int]:
    """Return the number of the clip that each frame is of; frames of a clip are drawn together."""
    clips = torch.arange(len(features)).repeat_interleave(features.shape[1])
    numbers: list[int] = clips.tolist()
    return numbers


def _concept_shares(
    clips: Clips, tracks: Tracks, asked: Sequence[AskedClip], judge: Judge
) -> Float[Tensor, " asked"] | None:
    """Return in how many frames of each clip the concept is seen that was asked for.

    Of clips whose prompts name one; None where none does.
    """
    names = [concept.names[0] for concept in judge.classes.concepts]
    shares = []
    for place, wish in enumerate(asked):
        if wish.concept is None:
            continue
        if wish.concept not in names:
            raise EvaluationError(f"the judge knows no {wish.concept!r}; name one of its concepts.")
        angles = _ANGLES if MOTIONS[wish.kind].turns else (0.0,)
        shown = _surest(clips[place : place + 1], tracks.of(place), angles, judge)
        shares.append((shown == names.index(wish.concept)).float().mean())
    return torch.stack(shares) if shares else None


def _surest(
    clip: Clips, tracks: Tracks, angles: Sequence[float], judge: Judge
) -> Int[Tensor, " frames"]:
    """Return the concept of every frame, from the orientation in which the judge is surest."""
    chances = [
        judge.judge(aligned(clip, tracks, size=_SIZE, angle=angle).to(judge.device))
        .concept.softmax(dim=1)
        .cpu()
        for angle in angles
    ]
    return torch.stack(chances).amax(dim=0).argmax(dim=1)


def _in_words(clips: Clips) -> str:
    _, _, frames, height, width = clips.shape
    return f"{frames} frames of {width}x{height} pixels"
