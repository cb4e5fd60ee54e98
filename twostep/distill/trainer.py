"""One phase of training: draws transitions, lets the objective judge them, steps the optimisers."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.functional import softplus
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion import Denoise, landing, step
from twostep.distill.health import Health, Monitor
from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.pairs import (
    Transition,
    draw_noised_times,
    draw_times,
    noise_landed,
    teacher_landing,
)
from twostep.distill.recipe import Phase
from twostep.networks.adapters import Lora, checkpoint_gradients
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import (
    MovingAverage,
    OnIteration,
    Randomness,
    TrainingError,
    check_finite,
    learning_rate_factor,
    run_loop,
)
from twostep.training.optimiser import Trainable, make_optimiser, optimiser_step
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder


@runtime_checkable
class Source(Protocol):
    """Where training latents and what they are conditioned on come from."""

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return `count` latents of one size and their conditioning."""

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items of the same sizes."""


@runtime_checkable
class Judging(Trainable, Protocol):
    """A discriminator, of pictures or of anything else that has an encoder: a module with these two
    ways of looking.
    """

    pairs: bool

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the encoder makes of x at time t."""

    def judge(self, before: Tensor | None, after: Tensor) -> Tensor:
        """Return one logit per item."""

    def requires_grad_(self, requires_grad: bool, /) -> Any:
        """Switch learning on or off."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a phase needs beside its settings: data, the two models, and how to make a discriminator
    of one.

    `discriminator(teacher, pairs=...)` is called once a phase.
    """

    source: Source
    teacher: Denoiser
    student: Denoiser
    discriminator: Callable[..., Judging] = Discriminator

    @cached_property
    def trained(self) -> Trainable:
        """What learns: the student's LoRA if it has one, or else its network."""
        network, lora = self.student.network, self.student.lora
        return network if lora is None else Lora(network, lora)

    @property
    def device(self) -> torch.device:
        """Where the student is, and everything goes; randomness is drawn on the CPU, so it is the
        same everywhere.
        """
        parameter: Tensor = next(iter(self.student.network.parameters()))
        return parameter.device


def train_phase(
    phase: Phase,
    lesson: Lesson,
    folder: RunFolder,
    *,
    health: Health | None = None,
    on_iteration: OnIteration = lambda iteration, figures: None,
    on_checkpoint: Callable[[int], dict[str, float]] = lambda iteration: {},
) -> None:
    """Train the student of `lesson` in place; its averaged weights are what it keeps.

    `on_checkpoint` sees the student with those and returns how it looks (`health.measure`). Raises
    TrainingError when a loss stops being a number, or health asks for a pause; the checkpoint
    before that is kept.
    """
    trainer = (
        AdversarialTrainer(phase, lesson) if phase.judges else RegressionTrainer(phase, lesson)
    )
    monitor = Monitor(health or Health())
    if kept := folder.load(f"{phase.name}-health"):
        monitor.load_state_dict(kept)
    paused: list[str] = []

    def iterate(iteration: int, draw: Randomness) -> dict[str, float]:
        if paused:
            raise TrainingError(
                f"{phase.name} paused at iteration {iteration}: {paused[0]}. The same command goes on."
            )
        trainer.rate = monitor.rate
        return trainer.iterate(iteration, draw)

    def tell(iteration: int, figures: dict[str, float]) -> None:
        monitor.see(figures)
        on_iteration(iteration, figures)

    def keep(iteration: int) -> None:
        with trainer.average.applied():
            looks = on_checkpoint(iteration)
        trouble = "; ".join(monitor.symptoms(looks))
        folder.log(
            part=phase.name,
            iteration=iteration,
            **looks,
            **({"trouble": trouble} if trouble else {}),
        )
        if trouble and monitor.limits.action == "rollback":
            raise TrainingError(f"{phase.name} is ill at iteration {iteration}: {trouble}.")
        if trouble:
            warnings.warn(f"{phase.name}, iteration {iteration}: {trouble}", stacklevel=2)
            paused.extend([trouble] if monitor.limits.action == "pause" else [])

    while True:
        try:
            run_loop(
                iterate,
                phase,
                folder,
                phase.name,
                trainer.state,
                checkpoint_start=monitor.limits.action == "rollback",
                on_iteration=tell,
                on_checkpoint=keep,
            )
            break
        except TrainingError as error:
            if not monitor.roll_back():
                raise
            folder.log(part=phase.name, rolled_back=str(error), rate=monitor.rate)
            folder.save(f"{phase.name}-health", monitor.state_dict())
    lesson.trained.load_state_dict(trainer.average.weights)


class RegressionTrainer:
    """MSE against the teacher: on x_s, or, to convert the prediction type, on x0 as the frozen eps
    copy sees it.

    The latter (eq 27-29) is where one step to 0 lands.
    """

    def __init__(self, phase: Phase, lesson: Lesson) -> None:
        """Make the optimiser, Adam (0.9, 0.999), and the average."""
        self.phase, self.lesson = phase, lesson
        trained = lesson.trained
        self.optimiser = make_optimiser(
            trained,
            phase.learning_rate,
            weight_decay=phase.weight_decay,
            name=phase.optimiser,
        )
        self.average = MovingAverage(trained, phase.ema_decay)
        self.state: dict[str, Stateful] = {
            "student": trained,
            "optimiser": self.optimiser,
            "average": self.average,
        }
        self.rate = 1.0
        self._kept: dict[int, tuple[_Start, Tensor]] = {}

    def iterate(self, iteration: int, draw: Randomness) -> dict[str, float]:
        """Take one step down the squared error."""
        phase, lesson = self.phase, self.lesson
        with phase.autocast(lesson.device.type):
            (x_t, t, s, conditioning, _), target = self._taught(iteration, draw)
            reached = step(lesson.student(x_t, t, conditioning), s, lesson.student.schedule)
            loss = check_finite(
                ((reached - target).float() ** 2).mean(), phase.name, iteration, phase
            )
        factor = self.rate * learning_rate_factor(iteration, phase)
        norm = optimiser_step(loss, self.optimiser, lesson.trained, phase.gradient_clip, factor)
        self.average.update()
        return {"loss": loss.item(), "gradient": norm}

    def _taught(self, iteration: int, draw: Randomness) -> tuple[_Start, Tensor]:
        """Return a batch and the teacher's answer, which is asked for once and kept where batches
        are used again.

        Which batch it is depends on the iteration alone, so a resumed run asks again and gets the
        same.
        """
        number = iteration % math.ceil(self.phase.iterations / self.phase.reuse)
        taught = self._kept.get(number)
        if taught is None:
            first = draw if number == iteration else Randomness.at(self.phase.seed, number)
            start = x_t, t, _, _, teach = _draw_start(self.phase, self.lesson, first)
            taught = (
                start,
                teacher_landing(teach, x_t, t, *self.phase.grids, self.lesson.student.schedule),
            )
            if self.phase.reuse > 1:
                self._kept[number] = taught
        return taught


class AdversarialTrainer:
    """Student against discriminator, one step each on the same transitions (section 3.2; 1:1 is our
    choice).
    """

    def __init__(self, phase: Phase, lesson: Lesson) -> None:
        """Make a fresh discriminator from the teacher, and Adam (0, 0.99) for both."""
        self.phase, self.lesson = phase, lesson
        trained = lesson.trained
        torch.manual_seed(phase.seed)
        self.discriminator = lesson.discriminator(
            lesson.teacher, pairs=phase.objective == "conditional"
        )
        if phase.gradient_checkpointing and isinstance(self.discriminator, Discriminator):
            checkpoint_gradients(self.discriminator.encoder)  # a shared base does so already
        self.optimiser = make_optimiser(
            trained,
            phase.learning_rate,
            betas=(0.0, 0.99),
            weight_decay=phase.weight_decay,
            name=phase.optimiser,
        )
        rate = phase.discriminator_learning_rate or phase.learning_rate
        self.discriminator_optimiser = make_optimiser(
            self.discriminator,
            rate,
            betas=(0.0, 0.99),
            weight_decay=phase.weight_decay,
            name=phase.optimiser,
        )
        self.average = MovingAverage(trained, phase.ema_decay)
        self.rate = 1.0
        self.state: dict[str, Stateful] = {
            "student": trained,
            "optimiser": self.optimiser,
            "average": self.average,
        }
        self.state |= {
            "discriminator": self.discriminator,
            "discriminator_optimiser": self.discriminator_optimiser,
        }

    def iterate(self, iteration: int, draw: Randomness) -> dict[str, float]:
        """Take one step of the discriminator, then one of the student."""
        phase, student = self.phase, self.lesson.student
        with phase.autocast(self.lesson.device.type):
            x_t, t, s, conditioning, teach = _draw_start(phase, self.lesson, draw)
            real = teacher_landing(teach, x_t, t, *phase.grids, student.schedule)
            fake = step(student(x_t, t, conditioning), s, student.schedule)
            seen_at = s
            if phase.student_steps <= 2:  # clean landings are judged noised to t* (section 3.7.2)
                noised = draw_noised_times(phase.batch_size, phase.early_weight, draw.tensors)
                seen_at = torch.where(s == 0, noised[world().share(phase.batch_size)], s)
            eps = _draw_noise(x_t, phase, draw)
            real, fake = (noise_landed(x, s, seen_at, eps, student.schedule) for x in (real, fake))
            judged = Transition(x_t, fake, t, seen_at, conditioning)
            landings = [real, fake.detach()]
            if phase.r1_weight > 0:
                landings.append(real + 0.01 * _draw_noise(real, phase, draw))
            real_logits, fake_logits, *shaken_logits = self._judge(judged, landings)
            # Non-saturating, -log D(real) - log(1 - D(fake)) (eq 11).
            loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
            for logits in shaken_logits:
                # The approximated R1 penalty, |D(x) - D(x + N(0, 0.01^2))|^2 (eq 5 of arXiv
                # 2501.08316).
                loss = loss + phase.r1_weight * (real_logits - logits).square().mean()
            check_finite(loss, "discriminator", iteration, phase)
        share = self.rate * learning_rate_factor(iteration, phase)
        strain = optimiser_step(
            loss, self.discriminator_optimiser, self.discriminator, phase.gradient_clip, share
        )
        # Off until the backward pass is over, in which blocks may be computed anew.
        self.discriminator.requires_grad_(False)
        with phase.autocast(self.lesson.device.type):
            # Non-saturating, -log D(fake) (eq 12).
            against = check_finite(
                softplus(-self._judge_fake(judged)).mean(), "student", iteration, phase
            )
        push = optimiser_step(
            against, self.optimiser, self.lesson.trained, phase.gradient_clip, share
        )
        self.discriminator.requires_grad_(True)
        self.average.update()
        accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
        gap = (real_logits - fake_logits).mean()
        return {
            "student": against.item(),
            "discriminator": loss.item(),
            "accuracy": accuracy.item(),
            "gap": gap.item(),
            "student_gradient": push,
            "discriminator_gradient": strain,
        }

    def _judge(self, judged: Transition, landings: list[Tensor]) -> list[Tensor]:
        """Judge landings from the same x_t in one batch; x_t is looked at once."""
        parts, times = list(landings), [judged.s] * len(landings)
        if self.discriminator.pairs:
            parts, times = [*parts, judged.x_t], [*times, judged.t]
        conditioning = Conditioning.cat([judged.conditioning] * len(parts))
        seen = self.discriminator.features(torch.cat(parts), torch.cat(times), conditioning).chunk(
            len(parts)
        )
        before = seen[-1] if self.discriminator.pairs else None
        return [self.discriminator.judge(before, after) for after in seen[: len(landings)]]

    def _judge_fake(self, judged: Transition) -> Tensor:
        """Judge the student's landing, of x_t without gradient."""
        before = None
        if self.discriminator.pairs:
            with torch.no_grad():
                before = self.discriminator.features(judged.x_t, judged.t, judged.conditioning)
        after = self.discriminator.features(judged.x_s, judged.s, judged.conditioning)
        return self.discriminator.judge(before, after)


_Start = tuple[Tensor, Tensor, Tensor, Conditioning, Denoise]


def _draw_start(phase: Phase, lesson: Lesson, draw: Randomness) -> _Start:
    """Draw x_t at trained times t, where the student is to land, and the teacher for this
    conditioning.
    """
    mine = world().share(phase.batch_size)
    x0, conditioning = lesson.source.draw(phase.batch_size, draw.tensors, draw.words)
    x0, conditioning = x0[mine].to(lesson.device), conditioning[mine].to(lesson.device)
    unconditional = (
        lesson.source.empty(conditioning).to(lesson.device) if phase.guidance > 1 else conditioning
    )
    t = draw_times(phase.student_steps, phase.batch_size, draw.tensors)[mine]
    eps = _draw_noise(x0, phase, draw)
    x_t = lesson.student.schedule.add_noise(x0, eps, t)
    teach = lesson.teacher.with_guidance(conditioning, unconditional, phase.guidance)
    return x_t, t, landing(t, phase.grids[0]), conditioning, teach


def _draw_noise(like: Tensor, phase: Phase, draw: Randomness) -> Tensor:
    """Draw the whole batch's noise and return this process's share."""
    noise = torch.randn(phase.batch_size, *like.shape[1:], generator=draw.tensors)
    return noise[world().share(phase.batch_size)].to(like.device)
