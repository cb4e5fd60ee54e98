"""Drawing pairs: from the same noisy latents, where the teacher lands in n steps and where the
student lands in one.

t is the time where a step starts, s < t the time where it lands; 0 is clean, and the top time of
the schedule is pure noise. Section numbers are those of arXiv 2402.13929.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion import Denoise, Schedule, landing, solve, step, trained_times
from twostep.diffusion.shapes import Batch, Times
from twostep.media.codec import Codec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.processes import world

NOISED_SHARES = (0.01, 0.25, 0.5, 0.75)
"""Where t* lies, to which clean landings are noised before they are judged (section 3.7.2).

Shares of the way from clean data to pure noise: for SDXL the times 10, 250, 500 and 750.
"""


@runtime_checkable
class Source(Protocol):
    """Where training latents and what they are conditioned on come from."""

    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        """Return `count` latents of one size and their conditioning."""

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items of the same sizes."""


@dataclass(frozen=True, eq=False)
class Batches:
    """The examples of a stage, as one process gets them.

    Everything random is drawn for the whole batch on the CPU, and each process keeps its share, so
    a run draws the same on any device and on any number of processes.

    Args:
        source: of latents and conditioning.
        batch_size: examples of all processes together.
        device: where examples and noise go.
        codec: of the teacher, for methods that look at media; None where there is none.
    """

    source: Source
    batch_size: int
    device: torch.device
    codec: Codec | None = None

    def examples(self, random: Randomness) -> tuple[Batch, Conditioning]:
        """Draw clean latents x0 and their conditioning."""
        x0, conditioning = self.source.draw(self.batch_size, random.tensors, random.words)
        share = world().share(self.batch_size)
        return x0[share].to(self.device), conditioning[share].to(self.device)

    def empty(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for the same items."""
        return self.source.empty(conditioning).to(self.device)

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's share of what was drawn for the whole batch, on the CPU."""
        return whole[world().share(self.batch_size)]

    def noise(self, like: Batch, random: Randomness) -> Batch:
        """Draw normal noise in the shape of latents."""
        whole = torch.randn(self.batch_size, *like.shape[1:], generator=random.tensors)
        return self.share(whole).to(like.device)


@dataclass(frozen=True, eq=False)
class Transition:
    """One step, which can be judged: from x_t at t to x_s at s < t.

    Args:
        x_t: noisy latents where the step starts.
        x_s: latents where it lands.
        t: times of x_t, on the CPU.
        s: times of x_s, on the CPU.
        conditioning: what both are to show.
    """

    x_t: Batch
    x_s: Batch
    t: Times
    s: Times
    conditioning: Conditioning


@dataclass(frozen=True, eq=False)
class Pair:
    """The teacher's step and the student's from the same x_t to the same time.

    Args:
        teacher: the step of the teacher, without gradient.
        student: where the student lands, with gradient.
    """

    teacher: Transition
    student: Batch


def draw_teacher_step(
    batches: Batches,
    teacher: Denoiser,
    random: Randomness,
    *,
    drawn_steps: int,
    student_steps: int,
    teacher_steps: int,
    guidance: float,
) -> Transition:
    """Draw noisy latents, and let the teacher go from them to where the student is to land.

    Args:
        batches: give the examples.
        teacher: walks.
        random: draws examples, times and noise, in this order.
        drawn_steps: t is drawn from the times that a student of so many steps trains at.
        student_steps: steps of the student's grid, one of which is taken.
        teacher_steps: steps of the teacher's grid; a multiple of student_steps.
        guidance: scale of classifier-free guidance; 1 for none.
    """
    x0, positive = batches.examples(random)
    negative = batches.empty(positive) if guidance > 1 else positive
    schedule = teacher.schedule
    drawn = draw_times(drawn_steps, batches.batch_size, random.tensors, schedule)
    t = batches.share(drawn)
    eps = batches.noise(x0, random)
    x_t = schedule.add_noise(x0, eps, t)
    guided = teacher.with_guidance(positive, negative, guidance)
    x_s = teacher_landing(
        guided,
        x_t,
        t,
        student_steps=student_steps,
        teacher_steps=teacher_steps,
        schedule=schedule,
    )
    s = landing(t, student_steps, schedule)
    return Transition(x_t=x_t, x_s=x_s, t=t, s=s, conditioning=positive)


def student_landing(student: Denoiser, taken: Transition) -> Batch:
    """Return where the student lands in one step from where the teacher started."""
    prediction = student(taken.x_t, taken.t, taken.conditioning)
    return step(prediction, taken.s, student.schedule)


def draw_times(
    student_steps: int, count: int, generator: torch.Generator, schedule: Schedule
) -> Times:
    """Draw one of the times per item that a student of so many steps is trained at."""
    times = torch.tensor(trained_times(student_steps, schedule))
    return times[torch.randint(len(times), (count,), generator=generator)]


def teacher_landing(
    teacher: Denoise,
    x_t: Batch,
    t: Times,
    student_steps: int,
    teacher_steps: int,
    schedule: Schedule,
) -> Batch:
    """Return where the teacher lands in n = teacher_steps / student_steps steps of its own grid.

    It stops at 0, and so never lands below the student's s.
    """
    times = [t]
    for _ in range(teacher_steps // student_steps):
        times.append(landing(times[-1], teacher_steps, schedule))
    with torch.no_grad():
        return solve(teacher, x_t, torch.stack(times), schedule)


def draw_noised_times(
    count: int, early_weight: int, generator: torch.Generator, schedule: Schedule
) -> Times:
    """Draw one t* per item.

    Args:
        count: number of items.
        early_weight: weight of the lowest t*, where every other time has weight 1.
        generator: of the random numbers.
        schedule: whose times they are.
    """
    weights = torch.tensor([early_weight, 1, 1, 1], dtype=torch.float32)
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    return torch.tensor([schedule.time_at(share) for share in NOISED_SHARES])[drawn]


def noise_landed(x_s: Batch, s: Times, noised: Times, eps: Batch, schedule: Schedule) -> Batch:
    """Return latents with those that landed on 0 noised to their t*, and the others as they are."""
    landed = (s == 0).to(x_s.device).view(-1, *[1] * (x_s.ndim - 1))
    return torch.where(landed, schedule.add_noise(x_s, eps, noised), x_s)
