"""Drawing pairs: from the same noisy latents, where the teacher lands in n steps and where the
student lands in one.

t is the time where a step starts, s < t the time where it lands; 0 is clean, and the top time of
the schedule is pure noise. Section numbers are those of arXiv 2402.13929.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.data.walks import Walks
from twostep.diffusion import Denoise, Schedule, landing, solve, step, trained_times
from twostep.diffusion.shapes import Batch, Times, as_column, sent
from twostep.distill.times import draw_weighted_times
from twostep.media.codec import Codec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.device import has_own_memory
from twostep.training.loop import Randomness
from twostep.training.processes import World, world
from twostep.training.recipe import RecipeError

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


@runtime_checkable
class DrawsLatents(Protocol):
    """A source that can leave out what latents are conditioned on, which saves its encoding."""

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        """Return `count` latents of one size."""


@runtime_checkable
class HasWalks(Protocol):
    """A source of whole walks of the teacher."""

    def draw_walks(self, count: int, tensors: torch.Generator, words: Random) -> Walks:
        """Return `count` random walks, on the CPU."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source that can read the next batch while the last one is trained on."""

    def expect(self, count: int, tensors: torch.Generator, words: Random) -> None:
        """Begin to read what will be drawn next, from these random numbers, which are used up."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether it is still the same, which is asked when a run goes on."""

    def fingerprint(self) -> str:
        """Return a short text that is another one if any latents or conditioning are others."""


@dataclass(frozen=True, eq=False)
class Batches:
    """The examples of a stage, as one process gets them.

    Everything random is drawn for the whole batch on the CPU, and each process keeps its share, so
    a run draws the same on any device, on any number of processes, and in any number of parts.

    Args:
        source: of latents and conditioning.
        batch_size: examples of all processes and parts together.
        device: where examples and noise go.
        codec: of the teacher, for methods that look at media; None where there is none.
        part: which of the parts of a batch this is, where gradients are accumulated over several.
        num_parts: how many parts a batch is computed in.
    """

    source: Source
    batch_size: int
    device: torch.device
    codec: Codec | None = None
    part: int = 0
    num_parts: int = 1

    @property
    def slice(self) -> slice:
        """Which items of the whole batch are this process's, in this part."""
        here = world()
        position = here.rank * self.num_parts + self.part
        return World(position, here.size * self.num_parts).share(self.batch_size)

    def examples(self, random: Randomness) -> tuple[Batch, Conditioning]:
        """Draw clean latents x0 and their conditioning."""
        x0, conditioning = self.source.draw(self.batch_size, random.tensors, random.words)
        return sent(x0[self.slice], self.device), conditioning[self.slice].to(self.device)

    def latents(self, random: Randomness) -> Batch:
        """Draw clean latents x0 alone, for the whole batch and on the CPU."""
        if isinstance(self.source, DrawsLatents):
            return self.source.draw_latents(self.batch_size, random.tensors)
        x0, _ = self.source.draw(self.batch_size, random.tensors, random.words)
        return x0

    def walks(self, random: Randomness) -> Walks:
        """Draw walks of the teacher, which stay on the CPU; RecipeError if there are none."""
        if not isinstance(self.source, HasWalks):
            raise RecipeError(
                "walks: the data hold examples, and no walks of the teacher. Give data that do, as "
                '"twostep.data.drawn:walked_by_teacher", or leave walks out.'
            )
        drawn = self.source.draw_walks(self.batch_size, random.tensors, random.words)
        conditioning = drawn.conditioning[self.slice].to(self.device)
        return Walks(drawn.states[self.slice], drawn.times, conditioning)

    def expect(self, random: Randomness) -> None:
        """Let the source read ahead what an iteration of this randomness will draw.

        Not on a CPU, whose cores are better used for the iteration that is at work.
        """
        if isinstance(self.source, ReadsAhead) and has_own_memory(self.device):
            self.source.expect(self.batch_size, random.tensors, random.words)

    def empty(self, conditioning: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for the same items."""
        return self.source.empty(conditioning).to(self.device)

    def share(self, whole: Tensor) -> Tensor:
        """Return this process's share of what was drawn for the whole batch, on the CPU."""
        return whole[self.slice]

    def noise(self, like: Batch, random: Randomness) -> Batch:
        """Draw normal noise in the shape of latents."""
        whole = torch.randn(self.batch_size, *like.shape[1:], generator=random.tensors)
        return sent(self.share(whole), like.device)


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


@dataclass(frozen=True, eq=False)
class Start:
    """Where a step begins and is to end.

    Args:
        x0: the clean latents that were noised.
        eps: the noise that was added.
        x_t: noisy latents where the step starts.
        t: times of x_t, on the CPU.
        s: times where the step is to land, on the CPU.
        conditioning: what is to be shown.
    """

    x0: Batch
    eps: Batch
    x_t: Batch
    t: Times
    s: Times
    conditioning: Conditioning

    def landed(self, x_s: Batch) -> Transition:
        """Return the step that lands on `x_s`."""
        return Transition(x_t=self.x_t, x_s=x_s, t=self.t, s=self.s, conditioning=self.conditioning)


def draw_start(
    batches: Batches,
    random: Randomness,
    schedule: Schedule,
    *,
    drawn_steps: int,
    student_steps: int,
    time_weights: Sequence[float] | None = None,
) -> Start:
    """Draw noisy latents, and say where a student's step from them lands.

    Args:
        batches: give the examples.
        random: draws examples, times and noise, in this order.
        schedule: whose times they are.
        drawn_steps: t is drawn from the times that a student of so many steps trains at.
        student_steps: steps of the student's grid, one of which is taken.
        time_weights: as in `draw_times`.
    """
    x0, conditioning = batches.examples(random)
    t, s = draw_step_times(
        batches,
        random,
        schedule,
        drawn_steps=drawn_steps,
        student_steps=student_steps,
        time_weights=time_weights,
    )
    eps = batches.noise(x0, random)
    return Start(
        x0=x0,
        eps=eps,
        x_t=schedule.add_noise(x0, eps, t),
        t=t,
        s=s,
        conditioning=conditioning,
    )


def draw_step_times(
    batches: Batches,
    random: Randomness,
    schedule: Schedule,
    *,
    drawn_steps: int,
    student_steps: int,
    time_weights: Sequence[float] | None = None,
) -> tuple[Times, Times]:
    """Draw where a step of every item starts, and return that and where it lands, on the CPU.

    Arguments are those of `draw_start`.
    """
    drawn = draw_times(
        drawn_steps, batches.batch_size, random.tensors, schedule, weights=time_weights
    )
    t = batches.share(drawn)
    return t, landing(t, student_steps, schedule)


def teacher_step(
    start: Start,
    batches: Batches,
    teacher: Denoiser,
    *,
    student_steps: int,
    teacher_steps: int,
    guidance: float,
) -> Transition:
    """Let the teacher go from noisy latents to where the student is to land.

    Args:
        start: where it starts.
        batches: give the empty prompt.
        teacher: walks.
        student_steps: steps of the student's grid, one of which is taken.
        teacher_steps: steps of the teacher's grid; a multiple of student_steps.
        guidance: scale of classifier-free guidance; 1 for none.
    """
    positive = start.conditioning
    negative = batches.empty(positive) if guidance > 1 else positive
    x_s = teacher_landing(
        teacher.with_guidance(positive, negative, guidance),
        start.x_t,
        start.t,
        student_steps=student_steps,
        teacher_steps=teacher_steps,
        schedule=teacher.schedule,
    )
    return start.landed(x_s)


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

    `draw_start` and `teacher_step` in one; `landings.Landings` can keep what it returns.

    Args:
        batches: give the examples.
        teacher: walks.
        random: draws examples, times and noise, in this order.
        drawn_steps: t is drawn from the times that a student of so many steps trains at.
        student_steps: steps of the student's grid, one of which is taken.
        teacher_steps: steps of the teacher's grid; a multiple of student_steps.
        guidance: scale of classifier-free guidance; 1 for none.
    """
    start = draw_start(
        batches, random, teacher.schedule, drawn_steps=drawn_steps, student_steps=student_steps
    )
    return teacher_step(
        start,
        batches,
        teacher,
        student_steps=student_steps,
        teacher_steps=teacher_steps,
        guidance=guidance,
    )


def student_landing(student: Denoiser, taken: Transition) -> Batch:
    """Return where the student lands in one step from where the teacher started."""
    prediction = student(taken.x_t, taken.t, taken.conditioning)
    return step(prediction, taken.s, student.schedule)


def squared_error(landed: Batch, taken: Transition) -> Tensor:
    """Return the mean squared error of where a student landed to where a step did, in float32."""
    return ((landed - taken.x_s).float() ** 2).mean()


def draw_times(
    student_steps: int,
    count: int,
    generator: torch.Generator,
    schedule: Schedule,
    weights: Sequence[float] | None = None,
) -> Times:
    """Draw one of the times per item that a student of so many steps is trained at.

    Args:
        student_steps: of the student.
        count: number of items.
        generator: of the random numbers.
        schedule: whose times they are.
        weights: how often each time is drawn, from the highest down; None for all alike.
    """
    times = trained_times(student_steps, schedule)
    if weights is not None:
        return draw_weighted_times(times, weights, count, generator)
    return torch.tensor(times)[torch.randint(len(times), (count,), generator=generator)]


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
    count: int, weights: Sequence[float], generator: torch.Generator, schedule: Schedule
) -> Times:
    """Draw one t* per item.

    Args:
        count: number of items.
        weights: how often each t* is drawn, from the lowest up.
        generator: of the random numbers.
        schedule: whose times they are.
    """
    times = [schedule.time_at(share) for share in NOISED_SHARES]
    return draw_weighted_times(times, weights, count, generator)


def noise_landed(x_s: Batch, s: Times, noised: Times, eps: Batch, schedule: Schedule) -> Batch:
    """Return latents with those that landed on 0 noised to their t*, and the others as they are."""
    return torch.where(as_column(s == 0, x_s), schedule.add_noise(x_s, eps, noised), x_s)
