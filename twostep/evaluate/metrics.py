"""Figures of a set of pictures: do they show what was asked for, how far are they from others, what
have they lost.

Takes finished pictures, what each was asked to show, and a judge; it does not know what drew them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from twostep.evaluate.attributes import Attributes
from twostep.evaluate.bootstrap import Estimate, Resamples
from twostep.evaluate.diversity import feature_diversity, pixel_diversity
from twostep.evaluate.frechet import (
    FeatureStatistics,
    fit_features,
    frechet_distance,
    frechet_influences,
)
from twostep.evaluate.judge import Classes, Judge
from twostep.evaluate.kernel_distance import kernel_distance, kernel_influences
from twostep.evaluate.measurements import EvaluationError, Measurements, SecondJudge, measure
from twostep.evaluate.palette import OFF_PALETTE

_SCORES = ("concept", "subgroup", "style", "background", "off_palette")


@dataclass(frozen=True)
class Score:
    """How many pictures were counted, of those whose prompt asks for it.

    `low` and `high` bound the share, 95 % over prompts; None where they cannot be said.
    """

    num_right: int
    num_asked: int
    low: float | None = None
    high: float | None = None

    @property
    def share(self) -> float | None:
        """The counted ones' share, 0..1; None where nobody asked."""
        return self.num_right / self.num_asked if self.num_asked else None


@dataclass(frozen=True)
class Report:
    """The figures of one set of pictures; None where there was nothing to measure.

    *The reference* are other pictures, usually the teacher's of the same prompts from other noise.
    Intervals are of 95 %, over prompts (`evaluate.bootstrap`).

    Attributes:
        num_images: pictures in the set.
        num_unknown: those of which it is not known what they were asked to show.
        concept: right ones, over prompts that name a concept.
        subgroup: over prompts that name only a subgroup ("a bird"): the judged concept must lie in
            it.
        style: over prompts that name a style.
        background: over prompts that name a background.
        off_palette: pictures with a background that does not exist (`evaluate.palette`), over
            prompts that leave it open; 0..1, less is better.
        palette_distance: mean distance to the nearest that exists, over the same, in RGB levels.
        background_to_uniform: total variation between the judged backgrounds and equal shares,
            over the same; 0..1.
        background_to_reference: the same to the backgrounds of the reference.
        style_to_uniform: as for backgrounds, over prompts that leave the style open.
        style_to_reference: the same to the styles of the reference.
        high_pass: energy of fine detail (`evaluate.detail`).
        high_pass_ratio: the same over the reference's; 1 is as much detail.
        frechet_to_reference: Frechet distance in the judge's features.
        kernel_to_reference: kernel distance in the same.
        second_kernel_to_reference: kernel distance in the features of the second judge.
        loyalty: how far pictures are those that the teacher draws from the same noise: 1 less the
            mean distance to these in features, over their mean distance to the reference. 1 where
            they are the same, about 0 where the noise means something else.
        frechet_to_real: Frechet distance to real pictures.
        feature_diversity: between pictures of the same prompt, in features.
        pixel_diversity: the same in pixels.
        mean_blur_pixels: mean blur that the judge sees.
    """

    num_images: int
    num_unknown: int
    concept: Score
    subgroup: Score
    style: Score
    background: Score
    off_palette: Score
    palette_distance: Estimate | None
    background_to_uniform: Estimate | None
    background_to_reference: Estimate | None
    style_to_uniform: Estimate | None
    style_to_reference: Estimate | None
    high_pass: Estimate
    high_pass_ratio: Estimate | None
    frechet_to_reference: Estimate | None
    kernel_to_reference: Estimate | None
    second_kernel_to_reference: Estimate | None
    loyalty: Estimate | None
    frechet_to_real: float | None
    feature_diversity: float | None
    pixel_diversity: float | None
    mean_blur_pixels: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, shares included."""
        values = asdict(self)
        for name in _SCORES:
            values[name]["share"] = getattr(self, name).share
        return values


def evaluate(
    images: Float[Tensor, "batch 3 height width"],
    attributes: Sequence[Attributes | None],
    judge: Judge,
    *,
    reference: Measurements | None = None,
    same_noise: Measurements | None = None,
    real: FeatureStatistics | None = None,
    second: SecondJudge | None = None,
) -> Report:
    """Judge pictures against what each was asked to show.

    Args:
        images: pictures in -1..1 of the judge's size.
        attributes: what each picture was asked to show; None where that is not known.
        judge: judges them.
        reference: other pictures, by `measure`: distances are taken to them.
        same_noise: the teacher's pictures of the same prompts and noise in the same order: loyalty
            is taken to them.
        real: of real pictures, as in `judge.real`: the Frechet distance is taken to them.
        second: a second judge, if the reference was measured with it.

    Raises:
        JudgeError: the pictures cannot be judged.
        EvaluationError: the judge has no class for a prompt.
        FrechetError: a distance was asked for of fewer than two pictures.
    """
    measured = measure(images, attributes, judge, second=second)
    return summarise(measured, images, reference=reference, same_noise=same_noise, real=real)


def summarise(
    measured: Measurements,
    images: Float[Tensor, "batch 3 height width"],
    *,
    reference: Measurements | None = None,
    same_noise: Measurements | None = None,
    real: FeatureStatistics | None = None,
) -> Report:
    """Return the figures of pictures that have been measured; as `evaluate` does."""
    known = [index for index, each in enumerate(measured.attributes) if each is not None]
    attributes = [each for each in measured.attributes if each is not None]
    resamples = Resamples(_prompts(measured))
    images = images.float()
    return Report(
        num_images=len(measured),
        num_unknown=len(measured) - len(known),
        **_scores(measured, resamples),
        **_open_figures(measured, reference, resamples),
        **_distances(measured, reference, resamples),
        **_details(measured, reference, resamples),
        loyalty=_loyalty(measured, reference, same_noise, resamples),
        frechet_to_real=_distance_to_real(measured, real),
        feature_diversity=feature_diversity(measured.features[known], attributes),
        pixel_diversity=pixel_diversity(images[known], attributes),
        mean_blur_pixels=float(measured.blur_pixels.clamp(min=0).mean()),
    )


def _prompts(measured: Measurements) -> list[Attributes | int]:
    """Return what stands for each picture's prompt; those that are not known are each their own."""
    return [number if each is None else each for number, each in enumerate(measured.attributes)]


def _scores(measured: Measurements, resamples: Resamples) -> dict[str, Any]:
    """Return the scores against the prompts, by field of the report."""
    classes = measured.classes
    judged = [classes.concepts[index] for index in measured.concept.tolist()]
    kinds = [_kind(each, classes) for each in measured.attributes]
    hits = []
    for concept, asked in zip(judged, measured.attributes, strict=True):
        answers = (*concept.names, concept.subgroup)
        hits.append(asked is not None and bool(asked.names) and asked.names[0] in answers)
    styles = [None if each is None else each.style for each in measured.attributes]
    backgrounds = [None if each is None else each.background for each in measured.attributes]
    style_hits = _hits(measured.style, styles, classes.styles)
    background_hits = _hits(measured.background, backgrounds, classes.backgrounds)
    return {
        "concept": score(hits, [kind == "concept" for kind in kinds], resamples),
        "subgroup": score(hits, [kind == "subgroup" for kind in kinds], resamples),
        "style": score(style_hits, [style is not None for style in styles], resamples),
        "background": score(
            background_hits, [background is not None for background in backgrounds], resamples
        ),
    }


def _hits(judged: Tensor, asked: Sequence[str | None], names: Sequence[str]) -> list[bool]:
    """Tell where the answer of a head is the name that was asked for."""
    answers = [names[index] for index in judged.tolist()]
    return [answer == name for answer, name in zip(answers, asked, strict=True)]


def score(hits: Sequence[bool], asked: Sequence[bool], resamples: Resamples) -> Score:
    """Count the hits among the pictures whose prompt asks, with the interval of their share."""
    chosen = torch.tensor(asked)
    if not bool(chosen.any()):
        return Score(0, 0)
    values = torch.tensor(hits)
    share = resamples.mean(values.double(), chosen)
    return Score(int(values[chosen].sum()), int(chosen.sum()), share.low, share.high)


def _open_figures(
    measured: Measurements, reference: Measurements | None, resamples: Resamples
) -> dict[str, Any]:
    """Return the figures over prompts that leave background or style open."""
    no_background = _leaving_open(measured, "background")
    no_style = _leaving_open(measured, "style")
    distance = measured.palette_distance
    figures: dict[str, Any] = {
        "off_palette": score((distance > OFF_PALETTE).tolist(), no_background.tolist(), resamples),
        "palette_distance": None,
    }
    if bool(no_background.any()):
        figures["palette_distance"] = resamples.mean(distance, no_background)
    is_paired = reference is not None and reference.attributes == measured.attributes
    for name, chosen, num_classes in (
        ("background", no_background, len(measured.classes.backgrounds)),
        ("style", no_style, len(measured.classes.styles)),
    ):
        figures[f"{name}_to_uniform"] = None
        figures[f"{name}_to_reference"] = None
        if not bool(chosen.any()):
            continue
        judged = getattr(measured, name)
        figures[f"{name}_to_uniform"] = resamples.variation(judged, None, chosen, num_classes)
        if is_paired:
            figures[f"{name}_to_reference"] = resamples.variation(
                judged, getattr(reference, name), chosen, num_classes
            )
    return figures


def _leaving_open(measured: Measurements, name: str) -> Bool[Tensor, " items"]:
    """Tell which pictures' prompts leave style or background open."""
    return torch.tensor(
        [each is not None and getattr(each, name) is None for each in measured.attributes]
    )


def _distances(
    measured: Measurements, reference: Measurements | None, resamples: Resamples
) -> dict[str, Any]:
    """Return the distances to the reference, by field of the report."""
    names = ("frechet_to_reference", "kernel_to_reference", "second_kernel_to_reference")
    if reference is None:
        return dict.fromkeys(names)
    ours = measured.features
    theirs = reference.features
    paired = reference.attributes == measured.attributes
    others = None if paired else Resamples(_prompts(reference), seed=1)
    frechet = frechet_distance(fit_features(ours), fit_features(theirs))
    estimates: list[Estimate | None] = [
        resamples.moved_by_both(frechet, *frechet_influences(ours, theirs), others),
        _kernel(ours, theirs, resamples, others),
        None,
    ]
    second = measured.second_features
    other_second = reference.second_features
    if second is not None and other_second is not None:
        estimates[2] = _kernel(second, other_second, resamples, others)
    return dict(zip(names, estimates, strict=True))


def _kernel(
    ours: Tensor, theirs: Tensor, resamples: Resamples, others: Resamples | None
) -> Estimate:
    """Return the kernel distance; `others` are None where both sets have the same prompts."""
    paired = others is None
    value = kernel_distance(ours, theirs, paired=paired)
    influences = kernel_influences(ours, theirs, paired=paired)
    return resamples.moved_by_both(value, *influences, others)


def _details(
    measured: Measurements, reference: Measurements | None, resamples: Resamples
) -> dict[str, Any]:
    """Return the energy of fine detail, and its ratio to that of the same prompts' reference."""
    ratio = None
    if reference is not None and reference.attributes == measured.attributes:
        ratio = resamples.ratio(measured.high_pass, reference.high_pass)
    return {"high_pass": resamples.mean(measured.high_pass), "high_pass_ratio": ratio}


def _loyalty(
    measured: Measurements,
    reference: Measurements | None,
    same_noise: Measurements | None,
    resamples: Resamples,
) -> Estimate | None:
    """Return how far pictures are the teacher's of the same noise; None without these."""
    if same_noise is None or reference is None:
        return None
    for other in (same_noise, reference):
        if other.attributes != measured.attributes:
            raise EvaluationError(
                "loyalty needs the teacher's pictures of the same prompts in the same order."
            )
    to_same = (measured.features - same_noise.features).norm(dim=1)
    to_other = (measured.features - reference.features).norm(dim=1)
    if not bool(to_other.any()):
        return None
    share = resamples.ratio(to_same, to_other)
    if share.low is None or share.high is None:
        return Estimate(1 - share.value, None, None)
    return Estimate(1 - share.value, 1 - share.high, 1 - share.low)


def _distance_to_real(measured: Measurements, real: FeatureStatistics | None) -> float | None:
    return None if real is None else frechet_distance(fit_features(measured.features), real)


def _kind(asked: Attributes | None, classes: Classes) -> str:
    """Return what a prompt names, "concept", "subgroup" or "nothing"; EvaluationError if the judge
    does not know it.
    """
    if asked is None or not asked.names:
        return "nothing"
    name = asked.names[0]
    if any(name in concept.names for concept in classes.concepts):
        return "concept"
    if name in classes.subgroups:
        return "subgroup"
    raise EvaluationError(
        f"the judge knows no {name!r}; use the judge that was trained on these concepts."
    )
