"""What is measured of every single picture of a set; all figures are made of these.

Pictures may be measured in batches as they are drawn, and the batches joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.errors import TwostepError
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.detail import high_pass_energy
from twostep.evaluate.judge import Classes, Judge
from twostep.evaluate.palette import palette_distance


class EvaluationError(TwostepError):
    """Pictures and prompts that do not belong together, or that the judge does not know."""


@runtime_checkable
class SecondJudge(Protocol):
    """A network that nobody here trained, whose features are a second opinion."""

    def features(
        self, images: Float[Tensor, "items 3 height width"]
    ) -> Float[Tensor, "items features"]:
        """Return features of pictures in -1..1, on the CPU and without gradients."""


@dataclass(frozen=True, eq=False)
class Measurements:
    """Measurements of a set of pictures, one per picture, on the CPU.

    Attributes:
        attributes: what each was asked to show; None where that is not known.
        classes: what the numbers of concepts, styles and backgrounds mean.
        concept: the judged concept.
        style: the judged style.
        background: the judged background.
        features: of the judge.
        blur_pixels: the blur that the judge sees, a standard deviation in pixels.
        palette_distance: of the border's colour to the nearest background, RGB in 0..255.
        high_pass: energy of fine detail, of pictures in -1..1.
        second_features: of the second judge; None if there is none.
    """

    attributes: tuple[Attributes | None, ...]
    classes: Classes
    concept: Int[Tensor, " items"]
    style: Int[Tensor, " items"]
    background: Int[Tensor, " items"]
    features: Float[Tensor, "items features"]
    blur_pixels: Float[Tensor, " items"]
    palette_distance: Float[Tensor, " items"]
    high_pass: Float[Tensor, " items"]
    second_features: Float[Tensor, "items second"] | None

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.attributes)

    @staticmethod
    def cat(parts: Sequence[Measurements]) -> Measurements:
        """Join the measurements of several batches by one judge."""
        seconds = [part.second_features for part in parts]
        known = [features for features in seconds if features is not None]
        return Measurements(
            attributes=tuple(each for part in parts for each in part.attributes),
            classes=parts[0].classes,
            concept=torch.cat([part.concept for part in parts]),
            style=torch.cat([part.style for part in parts]),
            background=torch.cat([part.background for part in parts]),
            features=torch.cat([part.features for part in parts]),
            blur_pixels=torch.cat([part.blur_pixels for part in parts]),
            palette_distance=torch.cat([part.palette_distance for part in parts]),
            high_pass=torch.cat([part.high_pass for part in parts]),
            second_features=torch.cat(known) if len(known) == len(parts) else None,
        )


def measure(
    images: Float[Tensor, "items 3 height width"],
    attributes: Sequence[Attributes | None],
    judge: Judge,
    *,
    second: SecondJudge | None = None,
) -> Measurements:
    """Measure pictures, on the judge's device.

    Args:
        images: pictures in -1..1 of the judge's size.
        attributes: what each was asked to show; None where that is not known.
        judge: names what they show.
        second: gives further features.

    Raises:
        JudgeError: the pictures cannot be judged.
        EvaluationError: there are not as many attributes as pictures.
    """
    if len(images) != len(attributes):
        raise EvaluationError(
            f"got {len(images)} pictures and the attributes of {len(attributes)} prompts; give "
            "one per picture."
        )
    images = images.to(judge.device)
    verdict = judge.judge(images)
    with torch.no_grad():
        distance = palette_distance(images).cpu()
        high_pass = high_pass_energy(images).cpu()
    return Measurements(
        attributes=tuple(attributes),
        classes=judge.classes,
        concept=verdict.concept.argmax(dim=1).cpu(),
        style=verdict.style.argmax(dim=1).cpu(),
        background=verdict.background.argmax(dim=1).cpu(),
        features=verdict.features.cpu(),
        blur_pixels=verdict.blur_pixels.cpu(),
        palette_distance=distance,
        high_pass=high_pass,
        second_features=None if second is None else second.features(images),
    )
