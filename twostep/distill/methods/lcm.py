"""Latent consistency distillation: LCM (arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556).

The student is to say the same x0 at every point of one path of the flow. A pair of neighbours is
made of data noised to t and of the teacher's DDIM step from there to s < t, and what the student
says at t is pulled to what its moving average says at s. At time 0 the answer is the point itself,
which is what holds all others.

As in the paper and in diffusers' training script:

- Times are those of a solver of 50 steps, each drawn alike.
- The teacher's guidance is folded into its step, so the student needs none. Its scale is fixed, or
  drawn per item from `least_guidance` up to the stage's `guidance`.
- The distance is the pseudo-Huber one, elementwise, or the square.

What differs, and why:

- The scale is not told to the network. The paper embeds it with the time, which needs a layer that
  an SDXL UNet does not have and that no program would find in the exported file. LCM-LoRA does not
  embed it either; a student of a drawn scale then answers with its mean.
- c_skip and c_out are 0 and 1 above time 0. Theirs, 0.25 / (0.25 + (10 t)^2), are 6e-6 and 1 at the
  lowest time of the grid already.
- The step from the lowest time lands on clean latents, where theirs lands on index 0, which keeps
  3 % noise.

With `lora_rank` this is LCM-LoRA: the target is then the same LoRA without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twostep.diffusion import (
    Prediction,
    Schedule,
    guide,
    landing,
    step,
    trailing_times,
)
from twostep.diffusion.shapes import Batch, Time, Times, as_column
from twostep.distill.method import ContractChanges, Cost, Method, MethodSettings, Models
from twostep.distill.methods.renoising import refuse_teacher_steps, renoising_contract
from twostep.distill.pairs import Batches, Transition
from twostep.distill.roles import OptimiserSettings, Role, learner, moving_average_of
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

_EMA_DECAY = 0.95
"""Decay of the target of a whole network: the default of diffusers' script; the paper has
0.999943.
"""


class LcmSettings(MethodSettings):
    """The settings of latent consistency distillation."""

    name: str = "lcm"
    solver_steps: int = Field(
        50, gt=0, description="steps of the grid whose neighbours are compared; 50 in the paper"
    )
    least_guidance: float | None = Field(
        None,
        ge=1,
        description="draw the teacher's scale per item from here up to guidance, else it is fixed",
    )
    target_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of the averaged target; 0 is the student itself without gradient, as "
        "with a LoRA if not given; else 0.95",
    )
    distance: Literal["huber", "squared"] = Field("huber", description="between the two answers")
    huber_width: float = Field(
        0.001, gt=0, description="errors below it count squared, larger ones once"
    )


class Lcm(Method[Transition]):
    """The student's x0 at t is pulled to its own average's x0 one step of the teacher lower."""

    name: ClassVar[str] = "lcm"
    Settings: ClassVar[type[MethodSettings]] = LcmSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        refuse_teacher_steps(stage)
        assert isinstance(stage.method, LcmSettings)
        self.stage = stage
        self.settings = stage.method
        least = self.settings.least_guidance
        if least is not None and least > stage.guidance:
            raise ValueError(
                f"least_guidance {least:g} is above the stage's guidance {stage.guidance:g}, up to "
                "which scales are drawn"
            )
        if stage.student_steps > self.settings.solver_steps:
            raise ValueError(
                f"{stage.student_steps} steps of a student that knows the times of "
                f"{self.settings.solver_steps}: give at least as many solver_steps"
            )

    @property
    def target_decay(self) -> float:
        """The decay of the averaged target; 0 if there is none."""
        if self.settings.target_decay is not None:
            return self.settings.target_decay
        return _EMA_DECAY if self.stage.lora_rank is None else 0.0

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """The student learns, and the target follows it."""
        roles = {"student": learner(student, OptimiserSettings.of(self.stage))}
        if self.target_decay > 0:
            roles["target"] = moving_average_of(
                "student", student, name="target", decay=self.target_decay
            )
        return roles

    def draw(
        self, iteration: int, batches: Batches, models: Models, random: Randomness
    ) -> Transition:
        """Noise data to a time of the solver's grid, and let the teacher take one step."""
        teacher: Denoiser = models["teacher"]
        schedule = teacher.schedule
        x0, conditioning = batches.examples(random)
        grid = torch.tensor(trailing_times(self.settings.solver_steps, schedule))
        drawn = torch.randint(len(grid), (batches.batch_size,), generator=random.tensors)
        scales = batches.share(self._draw_scales(batches.batch_size, random.tensors))
        t = batches.share(grid[drawn])
        x_t = schedule.add_noise(x0, batches.noise(x0, random), t)
        s = landing(t, self.settings.solver_steps, schedule)
        with torch.no_grad():
            prediction = self._guided(teacher, x_t, t, conditioning, batches, scales)
            x_s = step(prediction, s, schedule)
        return Transition(x_t=x_t, x_s=x_s, t=t, s=s, conditioning=conditioning)

    def _draw_scales(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the scale of the guidance of each item."""
        least = self.settings.least_guidance
        if least is None:
            return torch.full((count,), self.stage.guidance)
        return least + (self.stage.guidance - least) * torch.rand(count, generator=generator)

    def _guided(
        self,
        teacher: Denoiser,
        x_t: Batch,
        t: Times,
        conditioning: Conditioning,
        batches: Batches,
        scales: Tensor,
    ) -> Prediction:
        """Return the teacher's prediction under a guidance of its own for every item."""
        if self.stage.guidance == 1:
            return teacher(x_t, t, conditioning)
        both = Conditioning.cat([conditioning, batches.empty(conditioning)])
        prediction = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        x0, x0_negative = prediction.x0.chunk(2)
        eps, eps_negative = prediction.eps.chunk(2)
        return guide(
            Prediction(x0, eps), Prediction(x0_negative, eps_negative), as_column(scales, x_t)
        )

    def loss(self, role: str, pair: Transition, models: Models) -> Mapping[str, Tensor]:
        """Return the distance between the student's x0 at t and the target's at s."""
        student: Denoiser = models["student"]
        target = consistent_x0(models.get("target", student), pair.x_s, pair.s, pair.conditioning)
        difference = (student(pair.x_t, pair.t, pair.conditioning).x0 - target).float()
        squares = difference.square()
        if self.settings.distance == "squared":
            return {"total": squares.mean()}
        width = self.settings.huber_width
        return {"total": ((squares + width**2).sqrt() - width).mean()}

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: it knows all times of the solver, and visits a few."""
        grid = trailing_times(self.settings.solver_steps, last_student.schedule)
        steps = self.stage.student_steps
        visited = visited_times(steps, self.settings.solver_steps, last_student.schedule)
        return renoising_contract(last_student, steps, visited=visited, trained=grid)

    def cost(self) -> Cost:
        """Return the teacher's one step."""
        return Cost(2 if self.stage.guidance > 1 else 1)


@torch.no_grad()
def consistent_x0(model: Denoiser, x: Batch, t: Times, conditioning: Conditioning) -> Batch:
    """Return what a consistency function says, without gradient: at time 0 the point itself.

    Args:
        model: says x0 above time 0.
        x: latents at times t.
        t: times in 0..top, one per item on the CPU.
        conditioning: what they are to show.
    """
    lowest = torch.full_like(t, model.schedule.lowest)
    x0 = model(x, torch.where(t == 0, lowest, t), conditioning).x0
    return torch.where(as_column(t == 0, x), x, x0)


def visited_times(steps: int, solver_steps: int, schedule: Schedule) -> tuple[Time, ...]:
    """Return the times that a student of so many steps visits, among those of the solver.

    They are every (solver_steps / steps)-th of the falling grid, rounded down: of 50 and 4 the
    times 1000, 760, 500 and 260, in diffusers' LCMScheduler 999, 759, 499 and 259.
    """
    grid = trailing_times(solver_steps, schedule)
    return tuple(grid[i * solver_steps // steps] for i in range(steps))
