"""Lightning: adversarial distillation to the letter of arXiv 2402.13929.

One head on the mid-block, the non-saturating loss, the teacher's landings as the real ones, no
penalty and no other term. What the paper does not say is decided here: discriminator and student
take one step each on the same pair, in this order; the discriminator computes in the stage's
precision. "adversarial" is the same game with what was added since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from twostep.distill.method import MethodSettings
from twostep.distill.methods.adversarial import (
    Adversarial,
    AdversarialSettings,
    DiscriminatorSettings,
)

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class LightningSettings(DiscriminatorSettings):
    """The settings of the paper's method."""

    name: str = "lightning"
    early_weight: int = Field(
        1, ge=1, description="weight of t* = 10 against 250, 500, 750 (section 3.7.2)"
    )


class Lightning(Adversarial):
    """The adversarial method with the paper's choices."""

    name: ClassVar[str] = "lightning"
    Settings: ClassVar[type[MethodSettings]] = LightningSettings

    def settings_of(self, stage: Stage) -> AdversarialSettings:
        """Return the paper's settings, with what a stage chooses."""
        chosen = stage.method
        assert isinstance(chosen, LightningSettings)
        shared = {key: getattr(chosen, key) for key in DiscriminatorSettings.model_fields}
        return AdversarialSettings(
            **shared,
            real="teacher",
            loss="non-saturating",
            levels="mid",
            discriminator_precision="stage",
            noised_weights=(float(chosen.early_weight), 1.0, 1.0, 1.0),
        )
