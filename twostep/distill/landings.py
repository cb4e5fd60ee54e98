"""Where the teacher lands, for every method that learns from a teacher's steps.

A batch and the teacher's answer may be used more than once: for the length of a stage in memory
(`reuse`), or for good in a folder on disk that many runs share (`bank`). Which batch an iteration
uses depends on its number alone, so a resumed run, which has kept nothing, draws the same again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from twostep.diffusion import Schedule, trained_times
from twostep.diffusion.shapes import sent
from twostep.distill.bank import CHUNK, Bank, digest_of_examples, digest_of_weights
from twostep.distill.method import Cost, MethodSettings
from twostep.distill.pairs import (
    Batches,
    Start,
    Transition,
    draw_start,
    draw_step_times,
    teacher_step,
)
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.processes import world
from twostep.training.recipe import RecipeError

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

_BANK_SEED = 0
"""All runs draw a bank's examples from this seed, whatever their own, so they can share it."""


class LandingSettings(MethodSettings):
    """The settings of methods that learn from a teacher's steps."""

    reuse: int = Field(
        1, ge=1, description="times each batch, kept in memory with the teacher's answer, is used"
    )
    bank: Path | None = Field(
        None,
        description="folder of the teacher's landings: what is missing is computed and written "
        "there, and every run with the same teacher, data and grid uses it",
    )
    bank_size: int = Field(
        16_384, gt=0, description="examples that are drawn from the bank; a multiple of batch_size"
    )
    walks: bool = Field(
        False,
        description="learn steps of the teacher's whole sampling trajectories (ODE pairs), which "
        "the data hold, in the place of steps from noised examples; the teacher is not asked again",
    )
    time_weights: tuple[float, ...] | None = Field(
        None,
        description="how often each trained time is drawn, from the highest down; all alike where "
        "not given",
    )


def check_weights(name: str, weights: tuple[float, ...], count: int) -> None:
    """Refuse weights that are not one per time: ValueError."""
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(
            f"{name} must be {count} numbers of at least 0, not all 0, one for each time; got "
            f"{list(weights)}"
        )


@dataclass(eq=False)
class Landings:
    """The teacher's steps of a stage.

    Args:
        stage: whose settings decide them.
        settings: of the stage's method.
        student_steps: steps of the grid on which a step is as long as the student's.
        teacher_steps: steps of the teacher's own grid.
    """

    stage: Stage
    settings: LandingSettings
    student_steps: int
    teacher_steps: int
    _kept: dict[tuple[int, int], Transition] = field(default_factory=dict)
    _bank: Bank | None = None

    def __post_init__(self) -> None:
        """Refuse settings that do not fit together: ValueError."""
        if self.settings.time_weights is not None:
            count = len(trained_times(self.stage.student_steps))
            check_weights("time_weights", self.settings.time_weights, count)
        if self.settings.walks:
            self._check_walk_settings()
        if self.settings.bank is not None:
            self._check_bank_settings()

    def _check_walk_settings(self) -> None:
        if self.settings.bank is not None or self.settings.reuse > 1:
            raise ValueError("walks are kept already: leave bank and reuse out")
        if self.stage.guidance > 1:
            raise ValueError("walks were guided when they were made: leave guidance out")

    def _check_bank_settings(self) -> None:
        batch_size = self.stage.batch_size
        if self.settings.reuse > 1:
            raise ValueError("a bank is used again and again already: leave reuse out")
        if batch_size % CHUNK:
            raise ValueError(
                f"a bank is read in pieces of {CHUNK} examples: batch_size must be a multiple of "
                f"{CHUNK}, it is {batch_size}"
            )
        if self.settings.bank_size % batch_size:
            raise ValueError(
                f"bank_size {self.settings.bank_size} must be a multiple of batch_size {batch_size}"
            )

    @property
    def num_batches(self) -> int:
        """How many batches are drawn in the whole stage, or in a pass over the bank."""
        if self.settings.bank is not None:
            return self.settings.bank_size // self.stage.batch_size
        return math.ceil(self.stage.iterations / self.settings.reuse)

    def draw(
        self, iteration: int, batches: Batches, teacher: Denoiser, random: Randomness
    ) -> Transition:
        """Return the teacher's step of an iteration.

        Raises:
            RecipeError: the bank holds landings of another teacher, other data or another grid, or
                the data no walks, or walks on another grid.
        """
        if self.settings.walks:
            return self._from_walks(batches, teacher.schedule, random)
        if self.settings.bank is not None:
            return self._from_bank(iteration, batches, teacher)
        number = iteration % self.num_batches
        key = (number, batches.part)
        if key in self._kept:
            return self._kept[key]
        if number != iteration:
            random = Randomness.at(self.stage.seed, number, self.stage.name)
        taken = self._land(self._start(batches, teacher, random), batches, teacher)
        if self.settings.reuse > 1:
            self._kept[key] = taken
        return taken

    def cost(self) -> Cost:
        """Return the teacher's calls per example, and how many batches stay in memory."""
        if self.settings.walks:
            return Cost(0)
        num_calls = self.teacher_steps // self.student_steps
        if self.stage.guidance > 1:
            num_calls *= 2
        if self.settings.bank is not None:
            num_drawn = self.stage.iterations * self.stage.batch_size
            return Cost(num_calls / max(1.0, num_drawn / self.settings.bank_size))
        num_kept = self.num_batches if self.settings.reuse > 1 else 0
        return Cost(num_calls / self.settings.reuse, num_kept)

    def _start(self, batches: Batches, teacher: Denoiser, random: Randomness) -> Start:
        return draw_start(
            batches,
            random,
            teacher.schedule,
            drawn_steps=self.stage.student_steps,
            student_steps=self.student_steps,
            time_weights=self.settings.time_weights,
        )

    def _land(self, start: Start, batches: Batches, teacher: Denoiser) -> Transition:
        return teacher_step(
            start,
            batches,
            teacher,
            student_steps=self.student_steps,
            teacher_steps=self.teacher_steps,
            guidance=self.stage.guidance,
        )

    def _from_walks(self, batches: Batches, schedule: Schedule, random: Randomness) -> Transition:
        """Return a step of every walk, from a time that is drawn for it."""
        walks = batches.walks(random)
        if len(walks.times) != self.teacher_steps + 1:
            raise RecipeError(
                f"stage {self.stage.name} has teacher_steps {self.teacher_steps}, and the data "
                f"hold walks of {len(walks.times) - 1} steps: give the same number."
            )
        t, s = draw_step_times(
            batches,
            random,
            schedule,
            drawn_steps=self.stage.student_steps,
            student_steps=self.student_steps,
            time_weights=self.settings.time_weights,
        )
        x_t, x_s = (sent(walks.at(times).float(), batches.device) for times in (t, s))
        return Transition(x_t=x_t, x_s=x_s, t=t, s=s, conditioning=walks.conditioning)

    def _from_bank(self, iteration: int, batches: Batches, teacher: Denoiser) -> Transition:
        """Return a batch of the bank; every pass over it goes in an order of its own."""
        num_passes, position = divmod(iteration, self.num_batches)
        order = list(range(self.num_batches))
        Random(f"{self.stage.seed}/{self.stage.name}/{num_passes}").shuffle(order)
        chunks_per_batch = self.stage.batch_size // CHUNK
        first = order[position] * chunks_per_batch
        in_chunks = replace(batches, batch_size=CHUNK)
        steps = [
            self._chunk(number, in_chunks, teacher)
            for number in range(first, first + chunks_per_batch)
        ]
        return Transition(
            x_t=torch.cat([step.x_t for step in steps]),
            x_s=torch.cat([step.x_s for step in steps]),
            t=torch.cat([step.t for step in steps]),
            s=torch.cat([step.s for step in steps]),
            conditioning=Conditioning.cat([step.conditioning for step in steps]),
        )

    def _chunk(self, number: int, batches: Batches, teacher: Denoiser) -> Transition:
        """Return a piece of the bank; the teacher walks only if it is not there yet."""
        if self._bank is None:
            self._bank = self._open_bank(batches, teacher)
        start = self._start(batches, teacher, _bank_randomness(number))
        kept = self._bank.read(number, batches.slice)
        if kept is not None:
            return start.landed(sent(kept, start.x_t.device).to(start.x_t.dtype))
        taken = self._land(start, batches, teacher)
        self._bank.write(number, batches.slice, taken.x_s)
        return taken

    def _open_bank(self, batches: Batches, teacher: Denoiser) -> Bank:
        assert self.settings.bank is not None
        parts = world().size * batches.num_parts
        if CHUNK % parts:
            raise ValueError(
                f"a bank's pieces of {CHUNK} examples cannot be shared by {parts} processes and "
                "parts of a batch; take a power of two up to 16"
            )
        random = _bank_randomness(0)
        x0, conditioning = batches.source.draw(CHUNK, random.tensors, random.words)
        made_of = {
            "teacher": digest_of_weights(teacher),
            "prediction type": teacher.prediction_type,
            "schedule": repr(teacher.schedule),
            "examples": digest_of_examples(x0, conditioning),
            "student_steps": self.student_steps,
            "trained times": self.stage.student_steps,
            "teacher_steps": self.teacher_steps,
            "guidance": self.stage.guidance,
            "time_weights": self.settings.time_weights and list(self.settings.time_weights),
            "precision": self.stage.precision,
        }
        return Bank(self.settings.bank, made_of, tuple(x0.shape[1:]))


def _bank_randomness(number: int) -> Randomness:
    return Randomness.at(_BANK_SEED, number, "bank")


def without_kept(settings: MethodSettings) -> dict[str, object]:
    """Return the changes of a method's settings after which no landings are read that are kept.

    Neither those of a bank nor those of walks.
    """
    return {"bank": None, "walks": False} if isinstance(settings, LandingSettings) else {}
