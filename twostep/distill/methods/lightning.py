"""Lightning: adversarial distillation to the letter of arXiv 2402.13929.

One head on the mid-block, the non-saturating loss, the teacher's landings as the real ones, no
penalty and no other term. What the paper does not say is decided here: discriminator and student
take one step each on the same pair, in this order; the discriminator computes in the stage's
precision. "adversarial" is the same game with what was added since.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from twostep.distill.landings import LandingSettings
from twostep.distill.method import MethodSettings
from twostep.distill.methods.adversarial import Adversarial, AdversarialSettings
from twostep.training.recipe import ANY_TIME, WHILE_RUNNING

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class LightningSettings(LandingSettings):
    """The settings of the paper's method."""

    name: str = "lightning"
    objective: Literal["conditional", "unconditional"] = Field(
        description="conditional judges x_t with x_s, and keeps the flow; unconditional x_s alone"
    )
    discriminator_learning_rate: float | None = Field(
        None,
        gt=0,
        description="as learning_rate, as in the paper, where not given",
        json_schema_extra=WHILE_RUNNING,
    )
    discriminator_lora: bool = Field(
        False, description="its encoder as a LoRA on the shared base: needs lora_rank"
    )
    early_weight: int = Field(
        1, ge=1, description="weight of t* = 10 against 250, 500, 750 (section 3.7.2)"
    )
    largest_gap: float = Field(
        8.0,
        gt=0,
        description="health: largest mean difference of the logits of real and fake",
        json_schema_extra=ANY_TIME,
    )

    @property
    def variant(self) -> str | None:
        """The objective, which tells two stages of one student apart."""
        return self.objective


class Lightning(Adversarial):
    """The adversarial method with the paper's choices."""

    name: ClassVar[str] = "lightning"
    Settings: ClassVar[type[MethodSettings]] = LightningSettings

    def settings_of(self, stage: Stage) -> AdversarialSettings:
        """Return the paper's settings, with what a stage chooses."""
        chosen = stage.method
        assert isinstance(chosen, LightningSettings)
        return AdversarialSettings(
            name=chosen.name,
            objective=chosen.objective,
            reuse=chosen.reuse,
            bank=chosen.bank,
            bank_size=chosen.bank_size,
            time_weights=chosen.time_weights,
            real="teacher",
            loss="non-saturating",
            levels="mid",
            discriminator_learning_rate=chosen.discriminator_learning_rate,
            discriminator_lora=chosen.discriminator_lora,
            discriminator_precision="stage",
            noised_weights=(float(chosen.early_weight), 1.0, 1.0, 1.0),
            largest_gap=chosen.largest_gap,
        )
