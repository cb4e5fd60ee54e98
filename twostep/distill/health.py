"""The health of a run: when its pictures or figures say that it goes wrong, and what is done then.

A student that goes wrong shows it before a person looks: colours and contrast drift away from the
teacher's, seeds look alike, a figure of the method leaves its limits, a loss is no number. How
pictures are drawn, and how a student is trained, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twostep.training.loop import Means
from twostep.training.recipe import Settings

if TYPE_CHECKING:
    from twostep.distill.method import Limit

# A teacher whose pictures are flat would make every ratio infinite.
_LEAST_DENOMINATOR = 1e-6


class Health(Settings):
    """Limits beyond which a run is unhealthy, as ratios to the teacher, and what then happens.

    A method's own figures have limits of their own, among its settings.
    """

    action: Literal["warn", "pause", "rollback"] = Field(
        "warn",
        description="say it; stop after the checkpoint; or go back to the last good one at half "
        "the rate",
    )
    largest_drift: float = Field(
        0.5, gt=0, description="saturation or contrast may differ by this share"
    )
    least_diversity: float = Field(
        0.3, ge=0, le=1, description="share of the distance between the teacher's seeds"
    )
    most_rollbacks: int = Field(
        3, ge=0, description="how often a stage may go back before it gives up"
    )


def measure(
    student: Float[Tensor, "seeds prompts 3 height width"],
    teacher: Float[Tensor, "seeds prompts 3 height width"],
) -> dict[str, float]:
    """Return the student's saturation, contrast and diversity as ratios to the teacher's.

    Args:
        student: pictures in -1..1 of at least two seeds.
        teacher: pictures of the same prompts from the same noise.
    """
    looks = _looks(student)
    teacher_looks = _looks(teacher)
    return {
        name: value / max(teacher_looks[name], _LEAST_DENOMINATOR) for name, value in looks.items()
    }


def _looks(pictures: Tensor) -> dict[str, float]:
    """Return saturation, contrast and diversity of pictures [seeds, prompts, 3, height, width].

    Saturation is the mean spread of the channels, contrast the mean deviation of a picture's
    brightness, diversity the mean distance between pictures of neighbouring seeds.
    """
    spread = pictures.amax(dim=2) - pictures.amin(dim=2)
    brightness = pictures.mean(dim=2).flatten(2)
    between_seeds = (pictures[1:] - pictures[:-1]).abs()
    return {
        "saturation": spread.mean().item(),
        "contrast": brightness.std(dim=2).mean().item(),
        "diversity": between_seeds.mean().item(),
    }


class Monitor:
    """What is known of a stage's health, and how often it went back.

    Attributes:
        settings: limits of looks, and what happens beyond them.
        limits: of the method's figures, by name.
        rate: the factor of the learning rate that rollbacks have left.
        num_rollbacks: how many there were.
        figures: those that have limits, since the last look. They belong into the checkpoints of
            the stage, while `state_dict` outlives going back to one.
    """

    def __init__(self, settings: Health, limits: Mapping[str, Limit]) -> None:
        """Start healthy."""
        self.settings = settings
        self.limits = limits
        self.rate = 1.0
        self.num_rollbacks = 0
        self.figures = Means()

    def add(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of one iteration."""
        self.figures.add({name: figures[name] for name in self.limits.keys() & figures.keys()})

    def symptoms(self, looks: Mapping[str, float]) -> list[str]:
        """Return what has been wrong since the last call, each with its value and a likely cause.

        Args:
            looks: of `measure`; what is missing counts as healthy.
        """
        symptoms = []
        for name in ("saturation", "contrast"):
            if abs(looks.get(name, 1.0) - 1) > self.settings.largest_drift:
                symptoms.append(_drift(name, looks[name], "too high a learning_rate"))
        if looks.get("diversity", 1.0) < self.settings.least_diversity:
            symptoms.append(_drift("diversity", looks["diversity"], "a collapse"))
        means = self.figures.taken()
        for name, limit in self.limits.items():
            if abs(means.get(name, 0.0)) > limit.largest:
                symptoms.append(f"{name} is {means[name]:.1f} (likely {limit.likely_cause})")
        return symptoms

    def roll_back(self) -> bool:
        """Halve the rate for another try from the last checkpoint; False if none is left."""
        if self.settings.action != "rollback":
            return False
        if self.num_rollbacks == self.settings.most_rollbacks:
            return False
        self.num_rollbacks += 1
        self.rate /= 2
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"rate": self.rate, "num_rollbacks": self.num_rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned."""
        self.rate = state_dict["rate"]
        self.num_rollbacks = state_dict["num_rollbacks"]


def _drift(name: str, ratio: float, likely_cause: str) -> str:
    return f"{name} is {ratio:.2f} of the teacher's (likely {likely_cause})"
