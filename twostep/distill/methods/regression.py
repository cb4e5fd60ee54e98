"""Regression: the student's landing is pulled to the teacher's by the mean squared error.

Progressive distillation (arXiv 2202.00512) with the loss on x_s, as in the first stage of
arXiv 2402.13929 (section 3.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from twostep.diffusion import trained_times
from twostep.distill.landings import Landings, LandingSettings
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Method,
    MethodSettings,
    Models,
    few_step_prediction,
)
from twostep.distill.pairs import Batches, Pair, squared_error, student_landing
from twostep.distill.roles import OptimiserSettings, Role, learner
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class RegressionSettings(LandingSettings):
    """The settings of regression, and of conversion."""

    name: str = "regression"


class Regression(Method[Pair]):
    """Mean squared error between the student's landing x_s and the teacher's."""

    name: ClassVar[str] = "regression"
    Settings: ClassVar[type[MethodSettings]] = RegressionSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        if not self.learns_from_itself:
            stage.check_teacher_steps()
        self.stage = stage
        assert isinstance(stage.method, RegressionSettings)
        student_steps, teacher_steps = self.grids
        self.landings = Landings(stage, stage.method, student_steps, teacher_steps)

    @property
    def grids(self) -> tuple[int, int]:
        """Steps of the grids on which student and teacher walk."""
        assert self.stage.teacher_steps is not None
        return self.stage.student_steps, self.stage.teacher_steps

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Only the student learns."""
        return {"student": learner(student, OptimiserSettings.of(self.stage))}

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> Pair:
        """Draw the teacher's step, or take a kept one again, and take the student's."""
        taken = self.landings.draw(iteration, batches, models["teacher"], random)
        return Pair(taken, student_landing(models["student"], taken))

    def loss(self, role: str, pair: Pair, models: Models) -> Mapping[str, Tensor]:
        """Return the mean squared error, in float32."""
        return {"total": squared_error(pair.student, pair.teacher)}

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: a student of one step predicts x0 instead of eps."""
        steps = self.stage.student_steps
        return ContractChanges(
            few_step_prediction(steps, last_student.prediction_type),
            trained_times(steps, last_student.schedule),
        )

    def cost(self) -> Cost:
        """Return the teacher's steps, divided by how often each is used."""
        return self.landings.cost()
