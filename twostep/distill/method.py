"""The seam between a distillation method and the one trainer that runs all of them.

A method is one class in one file under `distill/methods/`. The trainer does, in every iteration,

    pair = method.draw(iteration, batches, models, random)
    for role in method.turns(iteration):
        losses = method.loss(role, pair, models)
        # one optimiser step of that role down losses["total"]

so a method says which networks take part, what they are shown and what each of them minimises, and
never steps, clips, saves or logs anything. What it returns beside "total" is logged under its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.contract import SamplerName
from twostep.diffusion import PredictionType, Schedule, falling_times
from twostep.diffusion.shapes import Time
from twostep.distill.pairs import Batches
from twostep.distill.roles import Role
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.recipe import Settings

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

PairT = TypeVar("PairT")

Models = Mapping[str, Any]
"""What a method computes with, by role: "teacher" and "student" are denoisers, the others what the
method's own `roles` made them.
"""


class MethodSettings(Settings):
    """The table `[stages.method]` of a recipe; a method derives its own settings from this."""

    name: str = Field(description='a built-in or registered method, or "module:attribute"')

    @property
    def variant(self) -> str | None:
        """The word that tells apart stages of one method in names, None if there is none."""
        return None


@dataclass(frozen=True)
class ContractChanges:
    """What the student of a stage declares, beside its name, its base and its steps.

    Args:
        prediction_type: what its network predicts.
        trained_times: the times at which it was trained, falling, in the unit of its schedule.
        sampler: how it is sampled: along the flow ("euler"), or with fresh noise ("renoise").
        sampling_times: the times that the sampler visits, falling, without the landing 0; empty
            for those of the trailing grid.
    """

    prediction_type: PredictionType
    trained_times: tuple[Time, ...]
    sampler: SamplerName = "euler"
    sampling_times: tuple[Time, ...] = ()

    def times_from_noise(self, steps: int, schedule: Schedule) -> tuple[Time, ...]:
        """Return the times that a student of so many steps visits, the landing 0 included."""
        if self.sampling_times:
            return (*self.sampling_times, 0)
        return falling_times(schedule.top, steps, schedule)


def check_warmup(name: str, warmup: int, iterations: int) -> None:
    """Refuse a setting by which the student waits as long as its stage lasts: ValueError."""
    if warmup >= iterations:
        raise ValueError(f"{name} {warmup} leaves the student none of the {iterations} iterations")


@dataclass(frozen=True)
class Limit:
    """A bound on a figure, beyond which a stage counts as unhealthy.

    Args:
        largest: bound on the absolute value of the figure's mean between two checkpoints.
        likely_cause: ends the message, as in "too high a learning_rate".
    """

    largest: float
    likely_cause: str


@dataclass(frozen=True)
class Cost:
    """What a stage costs that its networks do not show.

    Args:
        teacher_evaluations: calls of the teacher per example and iteration; guidance counts twice.
        num_kept_batches: batches that stay in memory for the whole stage.
        savings: changes of the method's own settings that save memory, one mapping each.
    """

    teacher_evaluations: int | float
    num_kept_batches: int = 0
    savings: tuple[Mapping[str, Any], ...] = ()


@runtime_checkable
class Procedure(Protocol[PairT]):
    """What the trainer asks for in every iteration, whatever is trained.

    It is made once for every stage. It may keep what it likes between iterations as long as a
    resumed run would get the same again.
    """

    def roles(self, teacher: Any, student: Any) -> Mapping[str, Role]:
        """Return every network that changes during the stage: "student", and whatever else.

        Args:
            teacher: frozen.
            student: its network, or its LoRA, is ready to be trained.
        """

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> PairT:
        """Return what is judged in an iteration.

        Args:
            iteration: counts from 0.
            batches: gives examples and noise, this process's share of them.
            models: by role.
            random: the only randomness; what is drawn from it must not depend on the process.
        """

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the roles that take an optimiser step in an iteration, in order."""
        return ("student",)

    def loss(self, role: str, pair: PairT, models: Models) -> Mapping[str, Tensor]:
        """Return what a role minimises, as a scalar "total", and scalar figures for the log.

        It is called right before the role's step, so it sees the steps of the turns before. All
        other roles but the student are frozen until the step is done.
        """

    def limits(self) -> Mapping[str, Limit]:
        """Return bounds on figures of its own, by the figure's name."""
        return {}

    def cost(self) -> Cost:
        """Return what a plan cannot see."""


@runtime_checkable
class Method(Procedure[PairT], Protocol[PairT]):
    """How a student is distilled in one stage.

    Attributes:
        name: of the method in recipes, in names of stages and in error messages.
        Settings: the type of its table `[stages.method]`.
        learns_from_itself: whether the student as it was before the stage is the teacher, frozen.
            Otherwise the recipe's `teacher_steps` says who teaches.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[MethodSettings]]
    learns_from_itself: ClassVar[bool] = False

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage, of which `stage.method` are the method's own.

        Raises:
            ValueError: settings do not fit together; the recipe is refused with this message.
        """

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Return every network that changes during the stage, as `Procedure.roles`."""

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return what the student declares.

        Args:
            last_student: the student as it was before the stage.
        """


def few_step_prediction(student_steps: int, before: PredictionType) -> PredictionType:
    """Return what a student of so many steps should predict, given what the last one predicted.

    An error in eps at the top time is multiplied by 14.6 in x0 (section 3.7.3 of
    arXiv 2402.13929), so a student of one step predicts x0 instead.
    """
    return "x0" if student_steps == 1 and before == "eps" else before
