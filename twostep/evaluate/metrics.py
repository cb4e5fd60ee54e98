"""Figures of a set of pictures: do they show what was asked for, how far are they from others, how
diverse are they.

Takes finished pictures, what each was asked to show, and a judge; it does not know what drew them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from twostep.errors import TwostepError
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.diversity import feature_diversity, pixel_diversity
from twostep.evaluate.frechet import FeatureStatistics, fit_features, frechet_distance
from twostep.evaluate.judge import Classes, Judge, Verdict


class EvaluationError(TwostepError):
    """Pictures and wishes that do not belong together, or that the judge does not know."""


@dataclass(frozen=True)
class Score:
    """How many pictures were judged right, of those whose prompt names the thing."""

    num_right: int
    num_asked: int

    @property
    def share(self) -> float | None:
        """The right ones' share, 0..1; None where nobody asked."""
        return self.num_right / self.num_asked if self.num_asked else None


@dataclass(frozen=True)
class Report:
    """The figures of one set of pictures; None where there was nothing to measure.

    Attributes:
        num_images: pictures in the set.
        num_unknown: those of which it is not known what they were asked to show.
        concept: over prompts that name a concept.
        subgroup: over prompts that name only a subgroup ("a bird"): the judged concept must lie in
            it.
        style: over prompts that name a style.
        background: over prompts that name a background.
        frechet_to_reference: distance to the reference, in the judge's features.
        frechet_to_real: distance to real pictures, in the same.
        feature_diversity: between pictures of the same wish, in features.
        pixel_diversity: the same in pixels.
        mean_blur_pixels: mean blur that the judge sees.
    """

    num_images: int
    num_unknown: int
    concept: Score
    subgroup: Score
    style: Score
    background: Score
    frechet_to_reference: float | None
    frechet_to_real: float | None
    feature_diversity: float | None
    pixel_diversity: float | None
    mean_blur_pixels: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, shares included."""
        values = asdict(self)
        for name in ("concept", "subgroup", "style", "background"):
            values[name]["share"] = getattr(self, name).share
        return values


def evaluate(
    images: Float[Tensor, "batch 3 height width"],
    attributes: Sequence[Attributes | None],
    judge: Judge,
    *,
    reference: FeatureStatistics | None = None,
    real: FeatureStatistics | None = None,
) -> Report:
    """Judge pictures against what each was asked to show.

    Args:
        images: pictures in -1..1 of the judge's size.
        attributes: what each picture was asked to show; None where that is not known.
        judge: judges them.
        reference: of other pictures, by `judge.statistics`: the Frechet distance is taken to them.
        real: of real pictures, as in `judge.real`: the same.

    Raises:
        JudgeError: the pictures cannot be judged.
        EvaluationError: the judge has no class for a wish.
        FrechetError: a distance was asked for of fewer than two pictures.
    """
    if len(images) != len(attributes):
        raise EvaluationError(
            f"got {len(images)} pictures and {len(attributes)} wishes; give one wish per picture."
        )
    verdict = judge.judge(images)
    known = [index for index, wish in enumerate(attributes) if wish is not None]
    wishes = [wish for wish in attributes if wish is not None]
    return Report(
        num_images=len(images),
        num_unknown=len(images) - len(known),
        **_scores(verdict, torch.tensor(known, dtype=torch.int64), wishes, judge.classes),
        frechet_to_reference=_distance(verdict, reference),
        frechet_to_real=_distance(verdict, real),
        feature_diversity=feature_diversity(verdict.features[known], wishes),
        pixel_diversity=pixel_diversity(images[known], wishes),
        mean_blur_pixels=float(verdict.blur_pixels.clamp(min=0).mean()),
    )


def _distance(verdict: Verdict, reference: FeatureStatistics | None) -> float | None:
    """Return the Frechet distance of judged pictures to a reference, if there is one."""
    if reference is None:
        return None
    return frechet_distance(fit_features(verdict.features), reference)


def _scores(
    verdict: Verdict, known: Int[Tensor, " known"], wishes: Sequence[Attributes], classes: Classes
) -> dict[str, Score]:
    """Return the scores of the pictures whose wish is known, by field of the report."""
    judged = [classes.concepts[index] for index in verdict.concept[known].argmax(dim=1).tolist()]
    kinds = [_kind(wish, classes) for wish in wishes]
    hits = []
    for concept, wish in zip(judged, wishes, strict=True):
        answers = (*concept.names, concept.subgroup)
        hits.append(bool(wish.names) and wish.names[0] in answers)
    return {
        "concept": _score_kind("concept", hits, kinds),
        "subgroup": _score_kind("subgroup", hits, kinds),
        "style": _score_named(
            verdict.style[known], [wish.style for wish in wishes], classes.styles
        ),
        "background": _score_named(
            verdict.background[known], [wish.background for wish in wishes], classes.backgrounds
        ),
    }


def _score_named(
    logits: Float[Tensor, "known classes"], asked: Sequence[str | None], names: Sequence[str]
) -> Score:
    """Score the answers of a head against the names that were asked for."""
    judged = [names[index] for index in logits.argmax(dim=1).tolist()]
    num_right = sum(answer == name for answer, name in zip(judged, asked, strict=True))
    num_asked = sum(name is not None for name in asked)
    return Score(num_right, num_asked)


def _score_kind(kind: str, hits: Sequence[bool], kinds: Sequence[str]) -> Score:
    """Score the pictures whose wish names a thing of this kind."""
    asked = [hit for hit, named in zip(hits, kinds, strict=True) if named == kind]
    return Score(sum(asked), len(asked))


def _kind(wish: Attributes, classes: Classes) -> str:
    """Return what a wish names, "concept", "subgroup" or "nothing"; EvaluationError if unknown."""
    if not wish.names:
        return "nothing"
    name = wish.names[0]
    if any(name in concept.names for concept in classes.concepts):
        return "concept"
    if name in classes.subgroups:
        return "subgroup"
    raise EvaluationError(
        f"the judge knows no {name!r}; use the judge that was trained on these concepts."
    )
