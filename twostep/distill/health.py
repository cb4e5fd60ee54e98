"""The health of a run: what pictures and discriminator say of it, and what is done where that is
bad.

A student that goes wrong shows it before a person looks: colours and contrast drift away from the
teacher's, seeds look alike, one side of the game wins outright, a loss is no number. How pictures
are drawn, and how to train, are unknown.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twostep.training.recipe import Settings


class Health(Settings):
    """Limits beyond which a run is ill, as ratios to the teacher, and what then happens."""

    action: Literal["warn", "pause", "rollback"] = Field(
        "warn",
        description="say it; stop after the checkpoint; or go back to the last good one at half the rate",
    )
    largest_drift: float = Field(
        0.5, gt=0, description="saturation or contrast may differ by this share"
    )
    least_diversity: float = Field(
        0.3, ge=0, le=1, description="share of the distance between the teacher's seeds"
    )
    largest_gap: float = Field(
        8.0, gt=0, description="mean difference of the logits of real and fake"
    )
    most_rollbacks: int = Field(
        3, ge=0, description="how often a phase may go back before it gives up"
    )


def measure(
    student: Float[Tensor, "seeds prompts 3 height width"],
    teacher: Float[Tensor, "seeds prompts 3 height width"],
) -> dict[str, float]:
    """Return the student's saturation, contrast and diversity between seeds as shares of the
    teacher's.

    Both drew the same prompts from the same noise; pictures are in -1..1, and there are at least
    two seeds.
    """
    own, of_teacher = _looks(student), _looks(teacher)
    return {name: own[name] / max(of_teacher[name], 1e-6) for name in own}


def _looks(pictures: Tensor) -> dict[str, float]:
    """Saturation: spread of the channels. Contrast: deviation of a picture's brightness. Diversity:
    between seeds.
    """
    return {
        "saturation": (pictures.amax(dim=2) - pictures.amin(dim=2)).mean().item(),
        "contrast": pictures.mean(dim=2).flatten(2).std(dim=2).mean().item(),
        "diversity": (pictures[1:] - pictures[:-1]).abs().mean().item(),
    }


@dataclass(eq=False)
class Monitor:
    """What is known of a phase's health, and the share of the learning rate that earlier tries have
    left.
    """

    limits: Health
    rate: float = 1.0
    num_rollbacks: int = 0
    gaps: list[float] = field(default_factory=list)

    def see(self, figures: dict[str, float]) -> None:
        """Take in what one iteration said."""
        self.gaps += [figures["gap"]] if "gap" in figures else []

    def symptoms(self, looks: dict[str, float]) -> list[str]:
        """Return what is wrong since the last call, with figures and a likely cause; nothing if all
        is well.
        """
        gap, self.gaps = sum(self.gaps) / max(1, len(self.gaps)), []
        limits = self.limits
        rules = [
            (
                abs(looks.get("saturation", 1) - 1) <= limits.largest_drift,
                "saturation",
                "too high a learning_rate",
            ),
            (
                abs(looks.get("contrast", 1) - 1) <= limits.largest_drift,
                "contrast",
                "too high a learning_rate",
            ),
            (
                looks.get("diversity", 1) >= limits.least_diversity,
                "diversity",
                "collapse: r1_weight may help",
            ),
        ]
        found = [
            f"{name} is {looks[name]:.2f} of the teacher's (likely {cause})"
            for fine, name, cause in rules
            if not fine
        ]
        if abs(gap) > limits.largest_gap:
            found.append(
                f"the discriminator's gap is {gap:.1f} (likely too high a discriminator_learning_rate)"
            )
        return found

    def roll_back(self) -> bool:
        """Halve the rate for another try from the last checkpoint; False where there were enough
        tries.
        """
        if self.limits.action != "rollback" or self.num_rollbacks == self.limits.most_rollbacks:
            return False
        self.num_rollbacks, self.rate = self.num_rollbacks + 1, self.rate / 2
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"rate": self.rate, "num_rollbacks": self.num_rollbacks}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Take over what `state_dict` returned."""
        self.rate, self.num_rollbacks = state_dict["rate"], state_dict["num_rollbacks"]
