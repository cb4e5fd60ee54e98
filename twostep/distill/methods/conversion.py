"""Conversion: a student that predicts eps becomes one that predicts x0, before its one step.

Its own frozen copy is the teacher, and the loss is the mean squared error on x0 (equations 27 to 29
of arXiv 2402.13929).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from twostep.diffusion import trained_times
from twostep.distill.method import ContractChanges, MethodSettings
from twostep.distill.methods.regression import Regression, RegressionSettings
from twostep.networks.denoiser import Denoiser

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class ConversionSettings(RegressionSettings):
    """The settings of a conversion."""

    name: str = "conversion"


class Conversion(Regression):
    """Regression on x0, as the student itself predicts it before the stage."""

    name: ClassVar[str] = "conversion"
    Settings: ClassVar[type[MethodSettings]] = ConversionSettings
    learns_from_itself: ClassVar[bool] = True

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage; a teacher has no place in them."""
        if stage.teacher_steps is not None:
            raise ValueError(
                f"teacher_steps = {stage.teacher_steps} in a conversion, in which the student's "
                "own frozen copy teaches: leave teacher_steps out"
            )
        super().__init__(stage)
        if self.landings.settings.walks:
            raise ValueError(
                "walks in a conversion, which keeps what the student predicts itself: leave walks "
                "out"
            )

    @property
    def grids(self) -> tuple[int, int]:
        """One step of a grid of one step lands on x0."""
        return 1, 1

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: the student predicts x0."""
        times = trained_times(self.stage.student_steps, last_student.schedule)
        return ContractChanges("x0", times)
