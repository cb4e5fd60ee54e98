"""Figures for a set of pictures: do they show what was asked for, how far are they from others, how
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

    `subgroup` counts prompts that name only a subgroup ("a bird"): the judged concept must lie in
    it. The Frechet distances are in the judge's features; diversity is between pictures of the same
    wish, in features and in pixels.
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
    """Judge pictures in -1..1 against what each was asked to show; None means that this is not
    known.

    `reference` and `real` are what the Frechet distances are taken to:
    `judge.statistics(pictures)`, or `judge.real`. Raises JudgeError for pictures that cannot be
    judged, EvaluationError for a wish that the judge has no class for, FrechetError for a distance
    of fewer than two pictures.
    """
    if len(images) != len(attributes):
        raise EvaluationError(
            f"got {len(images)} pictures and {len(attributes)} wishes; give one wish per picture."
        )
    verdict = judge.judge(images)
    known = [index for index, wish in enumerate(attributes) if wish is not None]
    wishes = [wish for wish in attributes if wish is not None]
    statistics = fit_features(verdict.features) if reference or real else None
    return Report(
        num_images=len(images),
        num_unknown=len(images) - len(known),
        **_scores(verdict, torch.tensor(known, dtype=torch.int64), wishes, judge.classes),
        frechet_to_reference=frechet_distance(statistics, reference)
        if statistics and reference
        else None,
        frechet_to_real=frechet_distance(statistics, real) if statistics and real else None,
        feature_diversity=feature_diversity(verdict.features[known], wishes),
        pixel_diversity=pixel_diversity(images[known], wishes),
        mean_blur_pixels=float(verdict.blur_pixels.clamp(min=0).mean()),
    )


def _scores(
    verdict: Verdict, known: Int[Tensor, " known"], wishes: Sequence[Attributes], classes: Classes
) -> dict[str, Score]:
    judged = [classes.concepts[index] for index in verdict.concept[known].argmax(dim=1).tolist()]
    kinds = [_kind(wish, classes) for wish in wishes]
    hits = [
        wish.names[0] in (*concept.names, concept.subgroup) if wish.names else False
        for concept, wish in zip(judged, wishes, strict=True)
    ]
    return {
        "concept": _score(hits, [kind == "concept" for kind in kinds]),
        "subgroup": _score(hits, [kind == "subgroup" for kind in kinds]),
        "style": _named(verdict.style[known], [wish.style for wish in wishes], classes.styles),
        "background": _named(
            verdict.background[known], [wish.background for wish in wishes], classes.backgrounds
        ),
    }


def _named(
    logits: Float[Tensor, "known classes"], asked: Sequence[str | None], names: Sequence[str]
) -> Score:
    judged = [names[index] for index in logits.argmax(dim=1).tolist()]
    pairs = list(zip(judged, asked, strict=True))
    return Score(sum(a == b for a, b in pairs), sum(b is not None for _, b in pairs))


def _score(hits: Sequence[bool], asked: Sequence[bool]) -> Score:
    return Score(sum(hit and wanted for hit, wanted in zip(hits, asked, strict=True)), sum(asked))


def _kind(wish: Attributes, classes: Classes) -> str:
    """Say whether a wish names a concept, a subgroup, or nothing; EvaluationError for a name the
    judge lacks.
    """
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
