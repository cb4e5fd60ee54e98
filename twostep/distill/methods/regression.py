"""Regression: the student's landing is pulled to the teacher's by the mean squared error.

Progressive distillation (arXiv 2202.00512) with the loss on x_s, as in the first stage of
arXiv 2402.13929 (section 3.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from twostep.diffusion import PredictionType, trained_times
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Method,
    MethodSettings,
    Models,
    few_step_prediction,
)
from twostep.distill.pairs import Batches, Pair, Transition, draw_teacher_step, student_landing
from twostep.distill.roles import Adam, Role, learner
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class RegressionSettings(MethodSettings):
    """The settings of regression, and of conversion."""

    name: str = "regression"
    reuse: int = Field(
        1, ge=1, description="times each batch, kept in memory with the teacher's answer, is used"
    )


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
        self.settings = stage.method
        self._kept: dict[int, Transition] = {}

    @property
    def grids(self) -> tuple[int, int]:
        """Steps of the grids on which student and teacher walk."""
        assert self.stage.teacher_steps is not None
        return self.stage.student_steps, self.stage.teacher_steps

    @property
    def num_batches(self) -> int:
        """How many batches are drawn in the whole stage."""
        return math.ceil(self.stage.iterations / self.settings.reuse)

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Only the student learns."""
        return {"student": learner(student, Adam.of(self.stage))}

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> Pair:
        """Draw the teacher's step, or take a kept one again, and take the student's."""
        taken = self.teacher_step(iteration, batches, models["teacher"], random)
        return Pair(taken, student_landing(models["student"], taken))

    def teacher_step(
        self, iteration: int, batches: Batches, teacher: Denoiser, random: Randomness
    ) -> Transition:
        """Return the teacher's step of an iteration, which is kept where batches are used again.

        Which batch an iteration uses depends on its number alone, so a resumed run, which has kept
        nothing, draws the same one again.
        """
        number = iteration % self.num_batches
        if number in self._kept:
            return self._kept[number]
        if number != iteration:
            random = Randomness.at(self.stage.seed, number)
        student_steps, teacher_steps = self.grids
        taken = draw_teacher_step(
            batches,
            teacher,
            random,
            drawn_steps=self.stage.student_steps,
            student_steps=student_steps,
            teacher_steps=teacher_steps,
            guidance=self.stage.guidance,
        )
        if self.settings.reuse > 1:
            self._kept[number] = taken
        return taken

    def loss(self, role: str, pair: Pair, models: Models) -> Mapping[str, Tensor]:
        """Return the mean squared error, in float32."""
        difference = pair.student - pair.teacher.x_s
        return {"total": (difference.float() ** 2).mean()}

    def describe(self, before: PredictionType) -> ContractChanges:
        """Return the contract's changes: a student of one step predicts x0 instead of eps."""
        steps = self.stage.student_steps
        return ContractChanges(few_step_prediction(steps, before), trained_times(steps))

    def cost(self) -> Cost:
        """Return the teacher's steps, divided by how often each is used."""
        student_steps, teacher_steps = self.grids
        num_calls = (teacher_steps // student_steps) * (2 if self.stage.guidance > 1 else 1)
        num_kept = self.num_batches if self.settings.reuse > 1 else 0
        return Cost(num_calls / self.settings.reuse, num_kept)
