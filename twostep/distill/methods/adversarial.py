"""Adversarial distillation: the student learns to fool a discriminator (arXiv 2402.13929).

The discriminator tells where the teacher landed (real) from where the student did (fake), with the
non-saturating loss of arXiv 1406.2661. Discriminator and student take one step each on the same
pair, in this order; that they alternate 1:1 is a choice, the paper does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from twostep.diffusion import trained_times
from twostep.diffusion.shapes import Batch
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Limit,
    Method,
    MethodSettings,
    Models,
    few_step_prediction,
)
from twostep.distill.methods.discriminator import (
    FORWARD_METHODS,
    Discriminator,
    Judge,
    LoraDiscriminator,
)
from twostep.distill.pairs import (
    Batches,
    Transition,
    draw_noised_times,
    draw_teacher_step,
    noise_landed,
    student_landing,
)
from twostep.distill.roles import Adam, Role, learner
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

BETAS = (0.0, 0.99)
"""Adam's betas for student and discriminator (section 3.6)."""

PERTURBATION = 0.01
"""Deviation of the noise of the approximated R1 penalty (arXiv 2501.08316)."""


class AdversarialSettings(MethodSettings):
    """The settings of adversarial distillation."""

    name: str = "adversarial"
    objective: Literal["conditional", "unconditional"] = Field(
        description="conditional judges x_t with x_s, and keeps the flow; unconditional x_s alone"
    )
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="as learning_rate where not given"
    )
    discriminator_lora: bool = Field(
        False, description="its encoder as a LoRA on the shared base: needs lora_rank"
    )
    r1_weight: float = Field(
        0.0, ge=0, description="weight of the approximated R1 penalty; 100 in arXiv 2501.08316"
    )
    early_weight: int = Field(
        1, ge=1, description="weight of t* = 10 against 250, 500, 750 (section 3.7.2)"
    )
    largest_gap: float = Field(
        8.0, gt=0, description="health: largest mean difference of the logits of real and fake"
    )

    @property
    def variant(self) -> str | None:
        """The objective, which tells two stages of one student apart."""
        return self.objective


@dataclass(frozen=True, eq=False)
class JudgedPair:
    """What the discriminator is shown: the landings of teacher and student.

    Args:
        student: the step from x_t to where the student landed, with gradient, as it is judged:
            a clean landing is noised to t*, and s is then t*.
        real: where the teacher landed, noised alike.
        perturbed: `real` with a little noise, for the R1 penalty; None without the penalty.
    """

    student: Transition
    real: Batch
    perturbed: Batch | None


class Adversarial(Method[JudgedPair]):
    """Student against discriminator."""

    name: ClassVar[str] = "adversarial"
    Settings: ClassVar[type[MethodSettings]] = AdversarialSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        stage.check_teacher_steps()
        assert isinstance(stage.method, AdversarialSettings)
        if stage.method.discriminator_lora and stage.lora_rank is None:
            raise ValueError(
                "discriminator_lora without lora_rank: only LoRA students share a base with it"
            )
        self.stage = stage
        self.settings = stage.method

    def make_discriminator(self, teacher: Denoiser) -> Judge:
        """Return a fresh discriminator that starts from the teacher."""
        conditional = self.settings.objective == "conditional"
        if self.settings.discriminator_lora:
            assert self.stage.lora_rank is not None
            # The shared base recomputes its blocks already, if the student does.
            return LoraDiscriminator(teacher, conditional=conditional, rank=self.stage.lora_rank)
        discriminator = Discriminator(teacher, conditional=conditional)
        if self.stage.gradient_checkpointing:
            discriminator.checkpoint_gradients()
        return discriminator

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Student and discriminator learn."""
        judge = self.make_discriminator(teacher)
        adam = Adam.of(
            self.stage, betas=BETAS, learning_rate=self.settings.discriminator_learning_rate
        )
        if isinstance(judge, LoraDiscriminator):
            discriminator = Role(judge, judge, adam, remove=judge.remove)
        else:
            discriminator = Role(judge, judge, adam, sharded_methods=FORWARD_METHODS)
        return {
            "student": learner(student, Adam.of(self.stage, betas=BETAS)),
            "discriminator": discriminator,
        }

    def draw(
        self, iteration: int, batches: Batches, models: Models, random: Randomness
    ) -> JudgedPair:
        """Let teacher and student step from the same x_t, and noise what landed on 0."""
        stage = self.stage
        student: Denoiser = models["student"]
        schedule = student.schedule
        assert stage.teacher_steps is not None
        taken = draw_teacher_step(
            batches,
            models["teacher"],
            random,
            drawn_steps=stage.student_steps,
            student_steps=stage.student_steps,
            teacher_steps=stage.teacher_steps,
            guidance=stage.guidance,
        )
        fake = student_landing(student, taken)
        seen_at = taken.s
        if stage.student_steps <= 2:
            # Clean landings are judged noised to t* (section 3.7.2); real and fake get the same t*
            # and the same noise, so that these tell nothing.
            noised = draw_noised_times(
                stage.batch_size, self.settings.early_weight, random.tensors, schedule
            )
            seen_at = torch.where(taken.s == 0, batches.share(noised), taken.s)
        eps = batches.noise(taken.x_t, random)
        real = noise_landed(taken.x_s, taken.s, seen_at, eps, schedule)
        fake = noise_landed(fake, taken.s, seen_at, eps, schedule)
        perturbed = None
        if self.settings.r1_weight > 0:
            perturbed = real + PERTURBATION * batches.noise(real, random)
        judged = replace(taken, x_s=fake, s=seen_at)
        return JudgedPair(judged, real, perturbed)

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the discriminator, then the student, which faces the one that has just learned."""
        return ("discriminator", "student")

    def loss(self, role: str, pair: JudgedPair, models: Models) -> Mapping[str, Tensor]:
        """Return the non-saturating loss of either side."""
        judge: Judge = models["discriminator"]
        if role == "student":
            # -log D(fake) (equation 12).
            return {"total": softplus(-judge_fake(judge, pair.student)).mean()}
        return self._discriminator_loss(judge, pair)

    def _discriminator_loss(self, judge: Judge, pair: JudgedPair) -> Mapping[str, Tensor]:
        landings = [pair.real, pair.student.x_s.detach()]
        if pair.perturbed is not None:
            landings.append(pair.perturbed)
        real, fake, *perturbed = judge_landings(judge, pair.student, landings)
        # -log D(real) - log(1 - D(fake)) (equation 11).
        total = softplus(-real).mean() + softplus(fake).mean()
        for logits in perturbed:
            # |D(x) - D(x + N(0, 0.01^2))|^2 (equation 5 of arXiv 2501.08316).
            total = total + self.settings.r1_weight * (real - logits).square().mean()
        share_told_apart = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return {"total": total, "accuracy": share_told_apart, "gap": (real - fake).mean()}

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: a student of one step predicts x0 instead of eps."""
        steps = self.stage.student_steps
        return ContractChanges(
            few_step_prediction(steps, last_student.prediction_type),
            trained_times(steps, last_student.schedule),
        )

    def limits(self) -> Mapping[str, Limit]:
        """Return the largest gap, beyond which one side of the game wins outright."""
        cause = "too high a discriminator_learning_rate"
        return {"gap": Limit(self.settings.largest_gap, cause)}

    def cost(self) -> Cost:
        """Return the teacher's steps; a discriminator of its own could become a LoRA."""
        stage = self.stage
        assert stage.teacher_steps is not None
        num_calls = stage.teacher_steps // stage.student_steps
        if stage.guidance > 1:
            num_calls *= 2
        if stage.lora_rank is None or self.settings.discriminator_lora:
            return Cost(num_calls)
        return Cost(num_calls, savings=({"discriminator_lora": True},))


def judge_landings(judge: Judge, step: Transition, landings: Sequence[Batch]) -> list[Tensor]:
    """Return the logits of several landings of a step from the same x_t.

    All go through the encoder in one batch, and x_t, if the discriminator is conditional, once.
    """
    latents = list(landings)
    times = [step.s] * len(landings)
    if judge.conditional:
        latents.append(step.x_t)
        times.append(step.t)
    conditioning = Conditioning.cat([step.conditioning] * len(latents))
    features = judge.features(torch.cat(latents), torch.cat(times), conditioning)
    parts = features.chunk(len(latents))
    before = parts[-1] if judge.conditional else None
    return [judge.judge(before, after) for after in parts[: len(landings)]]


def judge_fake(judge: Judge, step: Transition) -> Tensor:
    """Return the logits of the student's landing, with a gradient for the student.

    x_t needs no gradient, so its features are computed without one.
    """
    before = None
    if judge.conditional:
        with torch.no_grad():
            before = judge.features(step.x_t, step.t, step.conditioning)
    after = judge.features(step.x_s, step.s, step.conditioning)
    return judge.judge(before, after)
