"""What the methods have in common whose students predict x0 and add fresh noise to it.

LCM, ADD, LADD and DMD2 all make such students: at each of a few times the student says x0, and
where a time follows, x0 is noised to it with new noise. They learn from the teacher itself and not
along its grid, so a stage has no `teacher_steps`, unless its method says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from twostep.diffusion import trailing_times
from twostep.diffusion.shapes import Time
from twostep.distill.method import ContractChanges
from twostep.networks.denoiser import Denoiser

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


def refuse_teacher_steps(stage: Stage) -> None:
    """Refuse a grid of the teacher's: ValueError."""
    if stage.teacher_steps is not None:
        raise ValueError(
            f"teacher_steps = {stage.teacher_steps}, but the method {stage.method.name!r} learns "
            "from the teacher without walking its grid: leave teacher_steps out"
        )


def renoising_contract(
    last_student: Denoiser, steps: int, *, visited: tuple[Time, ...], trained: tuple[Time, ...]
) -> ContractChanges:
    """Return what a student declares that is sampled by renoising.

    It keeps predicting what the last student predicted, for it is never converted.

    Args:
        last_student: the student as it was before the stage.
        steps: of the student.
        visited: the times that its sampler visits, falling.
        trained: the times at which it was trained, falling.
    """
    is_trailing = visited == trailing_times(steps, last_student.schedule)
    return ContractChanges(
        last_student.prediction_type,
        trained_times=trained,
        sampler="renoise",
        sampling_times=() if is_trailing else visited,
    )
