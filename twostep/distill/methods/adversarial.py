"""Adversarial distillation: the student learns to fool a discriminator.

The discriminator tells where the teacher landed (real) from where the student did (fake); student
and discriminator learn in turn. This is the method of arXiv 2402.13929 with what our own trials
added to it, every piece a setting: heads on all levels of the encoder, a loss on the pair instead
of on either side, penalties that keep the discriminator flat, prompts that do not fit as further
fakes, and a term of distribution matching. The paper to the letter is the method "lightning".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from twostep.diffusion import step, trained_times
from twostep.diffusion.shapes import Batch, Times, sent
from twostep.distill.landings import Landings, LandingSettings, check_weights
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Limit,
    Method,
    MethodSettings,
    Models,
    check_warmup,
    few_step_prediction,
)
from twostep.distill.methods.discriminator import (
    FORWARD_METHODS,
    Discriminator,
    Judge,
    Levels,
    LoraDiscriminator,
    Precision,
)
from twostep.distill.methods.matching import (
    distribution_matching_loss,
    draw_matching_times,
    fake_score_loss,
)
from twostep.distill.pairs import (
    NOISED_SHARES,
    Batches,
    Transition,
    draw_noised_times,
    draw_start,
    noise_landed,
    squared_error,
)
from twostep.distill.roles import OptimiserSettings, Role, adapter_on, copy_of, learner
from twostep.distill.times import draw_uniform_times
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.recipe import ANY_TIME, WHILE_RUNNING

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

BETAS = (0.0, 0.99)
"""Adam's betas for student and discriminator (section 3.6)."""

DISCRIMINATOR = "discriminator"
FAKE_SCORE = "fake_score"


Objective = Literal["conditional", "unconditional"]
"""Whether a landing is judged with where it started, or alone."""


class DiscriminatorSettings(LandingSettings):
    """The settings that every game against a discriminator has."""

    objective: Objective = Field(
        description="conditional judges x_t with x_s, and keeps the flow; unconditional x_s alone"
    )
    discriminator_learning_rate: float | None = Field(
        None, gt=0, description="as learning_rate where not given", json_schema_extra=WHILE_RUNNING
    )
    discriminator_lora: bool = Field(
        False, description="its encoder as a LoRA on the shared base: needs lora_rank"
    )
    largest_gap: float = Field(
        8.0,
        gt=0,
        description="health: largest mean difference of the logits of real and fake",
        json_schema_extra=ANY_TIME,
    )

    @property
    def variant(self) -> str | None:
        """The objective, which tells two stages of one student apart."""
        return self.objective


class AdversarialSettings(DiscriminatorSettings):
    """The settings of adversarial distillation."""

    name: str = "adversarial"
    objective: Objective = Field(
        "unconditional",
        description="conditional judges x_t with x_s, and keeps the flow; unconditional x_s alone",
    )
    real: Literal["teacher", "data"] = Field(
        "teacher",
        description="what counts as real: where the teacher lands, or where the example itself "
        "lies, which costs no teacher and is no sharper or duller than the data",
    )
    loss: Literal["relativistic", "non-saturating"] = Field(
        "relativistic",
        description="relativistic compares real and fake from one x_t (arXiv 1807.00734, "
        "2501.05441); non-saturating judges either by itself (arXiv 1406.2661)",
    )
    levels: Levels = Field(
        "all", description="where the discriminator has heads: every encoder level, or mid-block"
    )
    head_learning_rate: float | None = Field(
        None,
        gt=0,
        description="of the fresh heads; as the rest of it where not given",
        json_schema_extra=WHILE_RUNNING,
    )
    discriminator_warmup: int = Field(
        0, ge=0, description="iterations at the start in which the discriminator learns alone"
    )
    discriminator_steps: int = Field(
        1, ge=1, description="steps of the discriminator, and of the fake score, per student step"
    )
    student_first: bool = Field(
        False,
        description="whether the student faces a discriminator that has not yet learned from the "
        "very landings it judges",
    )
    discriminator_precision: Precision = Field(
        "fp32", description="fp32, or stage for what the stage computes in"
    )
    r1_weight: float = Field(
        0.0, ge=0, description="weight of the approximated R1 penalty, on real landings"
    )
    r2_weight: float = Field(
        0.0, ge=0, description="weight of the approximated R2 penalty, on the student's landings"
    )
    perturbation: float = Field(
        0.05,
        gt=0,
        description="deviation of the noise of these penalties; 0.01 with weight 100 in arXiv "
        "2501.08316",
    )
    mismatched_weight: float = Field(
        0.0,
        ge=0,
        description="weight of real landings under another item's prompt as further fakes "
        "(arXiv 2505.08175)",
    )
    noised_weights: tuple[float, ...] = Field(
        (2.0, 1.0, 1.0, 1.0),
        description="how often clean landings are noised to t* = 10, 250, 500, 750 before they "
        "are judged (section 3.7.2), for one and two steps",
    )
    regression_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the mean squared error between the two landings, beside the game, "
        "as in regression alone; it costs no call of a network",
    )
    matching_weight: float = Field(
        0.0, ge=0, description="weight of distribution matching (arXiv 2405.14867) for the student"
    )
    matching_guidance: float = Field(
        3.0, ge=1, description="the teacher's guidance in distribution matching"
    )
    fake_score_learning_rate: float | None = Field(
        None,
        gt=0,
        description="of the fake score; as learning_rate where not given",
        json_schema_extra=WHILE_RUNNING,
    )


@dataclass(frozen=True, eq=False)
class Matched:
    """What distribution matching is shown of a batch: the student's clean pictures, noised.

    Args:
        x0: what the student predicts, clean, with gradient.
        t: times at which distributions are compared, on the CPU.
        t_of_fake_score: times at which the fake score learns, on the CPU.
        eps: the noise.
        empty: the conditioning of the empty prompt, for guidance.
    """

    x0: Batch
    t: Times
    t_of_fake_score: Times
    eps: Batch
    empty: Conditioning


@dataclass(frozen=True, eq=False)
class JudgedPair:
    """What the discriminator is shown: the landings of teacher and student.

    Args:
        taken: the step from x_t to what counts as real, before it is noised.
        student: the step from x_t to where the student landed, as it is judged: a clean landing is
            noised to t*, and s is then t*. It has a graph if the student's turn follows at once.
        landed: where the student landed, before it is noised; with a graph if `student` has one.
        real: where the teacher landed, noised alike.
        eps: the noise of t*.
        perturbing: small noise for the penalties; None without them.
        matched: for distribution matching; None without it.
    """

    taken: Transition
    student: Transition
    landed: Batch
    real: Batch
    eps: Batch
    perturbing: Batch | None = None
    matched: Matched | None = None


class Adversarial(Method[JudgedPair]):
    """Student against discriminator."""

    name: ClassVar[str] = "adversarial"
    Settings: ClassVar[type[MethodSettings]] = AdversarialSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        self.stage = stage
        self.settings = settings = self.settings_of(stage)
        if settings.discriminator_lora and stage.lora_rank is None:
            raise ValueError(
                "discriminator_lora without lora_rank: only LoRA students share a base with it"
            )
        check_warmup("discriminator_warmup", settings.discriminator_warmup, stage.iterations)
        if settings.head_learning_rate is not None and stage.optimiser == "prodigy":
            raise ValueError(
                "head_learning_rate: prodigy finds one rate for all of a network; leave it out"
            )
        check_weights("noised_weights", settings.noised_weights, len(NOISED_SHARES))
        if settings.matching_weight > 0 and stage.teacher != "first":
            raise ValueError(
                "matching_weight needs a teacher that knows all times: set the stage's teacher = "
                '"first"'
            )
        self.landings: Landings | None = None
        if settings.real == "teacher":
            stage.check_teacher_steps()
            assert stage.teacher_steps is not None
            self.landings = Landings(stage, settings, stage.student_steps, stage.teacher_steps)
        elif settings.bank is not None:
            raise ValueError('a bank holds the teacher\'s landings: real = "data" has none')
        elif settings.walks:
            raise ValueError('walks are the teacher\'s: real = "data" asks for examples instead')

    def settings_of(self, stage: Stage) -> AdversarialSettings:
        """Return the settings of this method in a stage."""
        assert isinstance(stage.method, AdversarialSettings)
        return stage.method

    def make_discriminator(self, teacher: Denoiser) -> Judge:
        """Return a fresh discriminator that starts from the teacher."""
        settings = self.settings
        conditional = settings.objective == "conditional"
        if settings.discriminator_lora:
            assert self.stage.lora_rank is not None
            # The shared base recomputes its blocks already, if the student does.
            return LoraDiscriminator(
                teacher,
                conditional=conditional,
                rank=self.stage.lora_rank,
                levels=settings.levels,
                precision=settings.discriminator_precision,
            )
        discriminator = Discriminator(
            teacher,
            conditional=conditional,
            levels=settings.levels,
            precision=settings.discriminator_precision,
        )
        if self.stage.gradient_checkpointing:
            discriminator.checkpoint_gradients()
        return discriminator

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Student and discriminator learn, and the fake score where distributions are matched."""
        roles = {
            "student": learner(student, OptimiserSettings.of(self.stage, betas=BETAS)),
            DISCRIMINATOR: self._discriminator_role(teacher),
        }
        if self.settings.matching_weight > 0:
            optimiser = OptimiserSettings.of(
                self.stage, learning_rate=self.settings.fake_score_learning_rate
            )
            if self.settings.discriminator_lora:
                assert self.stage.lora_rank is not None
                roles[FAKE_SCORE] = adapter_on(
                    teacher, FAKE_SCORE, rank=self.stage.lora_rank, optimiser=optimiser
                )
            else:
                roles[FAKE_SCORE] = copy_of(teacher, optimiser)
        return roles

    def _discriminator_role(self, teacher: Denoiser) -> Role:
        judge = self.make_discriminator(teacher)
        optimiser = OptimiserSettings.of(
            self.stage, betas=BETAS, learning_rate=self.settings.discriminator_learning_rate
        )
        heads_rate = self.settings.head_learning_rate
        if heads_rate is not None:
            optimiser = replace(optimiser, group_rates=(optimiser.learning_rate, heads_rate))
        if isinstance(judge, LoraDiscriminator):
            return Role(judge, judge, optimiser, remove=judge.remove, handed_on=judge.kept)
        handed_on = judge.kept if isinstance(judge, Discriminator) else None
        return Role(judge, judge, optimiser, sharded_methods=FORWARD_METHODS, handed_on=handed_on)

    def draw(
        self, iteration: int, batches: Batches, models: Models, random: Randomness
    ) -> JudgedPair:
        """Let teacher and student step from the same x_t, and noise what landed on 0."""
        student: Denoiser = models["student"]
        schedule = student.schedule
        taken = self._real_step(iteration, batches, models["teacher"], random)
        # A graph through the student is only built where it takes a step. Where gradients are
        # accumulated it is built in the student's turn, or the graphs of all parts stood at once.
        has_graph = "student" in self.turns(iteration) and batches.num_parts == 1
        seen_at = taken.s
        if self.stage.student_steps <= 2:
            # Clean landings are judged noised to t* (section 3.7.2); real and fake get the same t*
            # and the same noise, so that these tell nothing.
            noised = draw_noised_times(
                batches.batch_size, self.settings.noised_weights, random.tensors, schedule
            )
            seen_at = torch.where(taken.s == 0, batches.share(noised), taken.s)
        eps = batches.noise(taken.x_t, random)
        real = noise_landed(taken.x_s, taken.s, seen_at, eps, schedule)
        with torch.set_grad_enabled(has_graph):
            judged, landed, x0 = _land(student, taken, seen_at, eps)
        perturbing = None
        if self.settings.r1_weight > 0 or self.settings.r2_weight > 0:
            perturbing = self.settings.perturbation * batches.noise(real, random)
        matched = None
        if self.settings.matching_weight > 0:
            matched = self._draw_matched(x0, taken, batches, student, random)
        return JudgedPair(
            taken=taken,
            student=judged,
            landed=landed,
            real=real,
            eps=eps,
            perturbing=perturbing,
            matched=matched,
        )

    def _real_step(
        self, iteration: int, batches: Batches, teacher: Denoiser, random: Randomness
    ) -> Transition:
        """Return the step from x_t to what counts as real."""
        if self.landings is not None:
            return self.landings.draw(iteration, batches, teacher, random)
        start = draw_start(
            batches,
            random,
            teacher.schedule,
            drawn_steps=self.stage.student_steps,
            student_steps=self.stage.student_steps,
            time_weights=self.settings.time_weights,
        )
        # The example with the noise that x_t has too: one of the pictures that x_t may be of.
        alpha, sigma = teacher.schedule.coefficients(start.s, start.x0)
        return start.landed(alpha * start.x0 + sigma * start.eps)

    def _draw_matched(
        self,
        x0: Batch,
        taken: Transition,
        batches: Batches,
        student: Denoiser,
        random: Randomness,
    ) -> Matched:
        count = batches.batch_size
        t = draw_matching_times(count, random.tensors, student.schedule)
        t_of_fake_score = draw_uniform_times(count, random.tensors, student.schedule)
        return Matched(
            x0=x0,
            t=batches.share(t),
            t_of_fake_score=batches.share(t_of_fake_score),
            eps=batches.noise(x0, random),
            empty=batches.empty(taken.conditioning),
        )

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the discriminator and then the student, or the student first."""
        roles = [DISCRIMINATOR]
        if self.settings.matching_weight > 0:
            roles.append(FAKE_SCORE)
        since = iteration - self.settings.discriminator_warmup
        if since >= 0 and (since + 1) % self.settings.discriminator_steps == 0:
            return ["student", *roles] if self.settings.student_first else [*roles, "student"]
        return roles

    def loss(self, role: str, pair: JudgedPair, models: Models) -> Mapping[str, Tensor]:
        """Return the loss of a role."""
        if role == FAKE_SCORE:
            matched = pair.matched
            assert matched is not None
            total = fake_score_loss(
                matched.x0,
                pair.student.conditioning,
                matched.t_of_fake_score,
                matched.eps,
                fake=models[FAKE_SCORE],
                schedule=models["student"].schedule,
            )
            return {"total": total}
        if role == DISCRIMINATOR:
            return self._discriminator_loss(models[DISCRIMINATOR], pair)
        return self._student_loss(pair, models)

    def _student_loss(self, pair: JudgedPair, models: Models) -> Mapping[str, Tensor]:
        judge: Judge = models[DISCRIMINATOR]
        matched = pair.matched
        if not pair.student.x_s.requires_grad:
            judged, landed, x0 = _land(models["student"], pair.taken, pair.student.s, pair.eps)
            matched = matched and replace(matched, x0=x0)
            pair = replace(pair, student=judged, landed=landed)
        if self.settings.loss == "relativistic":
            fake, real = judge_fake(judge, pair.student, beside=[pair.real])
            adversarial = softplus(real - fake).mean()
        else:
            # -log D(fake) (equation 12 of arXiv 2402.13929).
            (fake,) = judge_fake(judge, pair.student)
            adversarial = softplus(-fake).mean()
        total = adversarial
        terms = {}
        if self.settings.regression_weight > 0:
            terms["regression"] = squared_error(pair.landed, pair.taken)
            total = total + self.settings.regression_weight * terms["regression"]
        if matched is not None:
            terms["matching"] = distribution_matching_loss(
                matched.x0,
                pair.student.conditioning,
                matched.t,
                matched.eps,
                teacher=models["teacher"],
                fake=models[FAKE_SCORE],
                guidance=self.settings.matching_guidance,
                empty=matched.empty,
            )
            total = total + self.settings.matching_weight * terms["matching"]
        if not terms:
            return {"total": total}
        return {"total": total, "adversarial": adversarial, **terms}

    def _discriminator_loss(self, judge: Judge, pair: JudgedPair) -> Mapping[str, Tensor]:
        settings = self.settings
        fake_landing = pair.student.x_s.detach()
        landings = [pair.real, fake_landing]
        if pair.perturbing is not None:
            landings += [pair.real + pair.perturbing, fake_landing + pair.perturbing]
        if settings.r2_weight == 0:
            landings = landings[:3]
        real, fake, *perturbed = judge_landings(judge, pair.student, landings)
        if settings.loss == "relativistic":
            total = softplus(fake - real).mean()
        else:
            # -log D(real) - log(1 - D(fake)) (equation 11 of arXiv 2402.13929).
            total = softplus(-real).mean() + softplus(fake).mean()
        if perturbed:
            # |D(x) - D(x + N(0, std^2))|^2 (equation 5 of arXiv 2501.08316).
            total = total + settings.r1_weight * (real - perturbed[0]).square().mean()
        if len(perturbed) > 1:
            total = total + settings.r2_weight * (fake - perturbed[1]).square().mean()
        figures = {}
        if settings.mismatched_weight > 0:
            # Under the prompt of the item before.
            other = replace(pair.student, conditioning=_rolled(pair.student.conditioning))
            (mismatched,) = judge_landings(judge, other, [pair.real])
            if settings.loss == "relativistic":
                told = softplus(mismatched - real).mean()
            else:
                told = softplus(mismatched).mean()
            total = total + settings.mismatched_weight * told
            figures["mismatched_gap"] = (real - mismatched).mean()
        return {
            "total": total,
            "accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()) / 2,
            "pairs_right": (real > fake).float().mean(),
            "gap": (real - fake).mean(),
            **figures,
        }

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
        cost = Cost(0) if self.landings is None else self.landings.cost()
        if self.settings.matching_weight > 0:
            num_guided = 2 if self.settings.matching_guidance > 1 else 1
            num_calls = cost.teacher_evaluations + num_guided / self.settings.discriminator_steps
            cost = replace(cost, teacher_evaluations=num_calls)
        if self.stage.lora_rank is None or self.settings.discriminator_lora:
            return cost
        return replace(cost, savings=({"discriminator_lora": True},))


def _land(
    student: Denoiser, taken: Transition, seen_at: Times, eps: Batch
) -> tuple[Transition, Batch, Batch]:
    """Return the student's step as it is judged, where it landed, and the x0 that it predicts.

    Args:
        student: takes one step.
        taken: says from where to where.
        seen_at: t* of what lands on 0, and where the others land.
        eps: the noise of t*.
    """
    prediction = student(taken.x_t, taken.t, taken.conditioning)
    landed = step(prediction, taken.s, student.schedule)
    seen = noise_landed(landed, taken.s, seen_at, eps, student.schedule)
    return replace(taken, x_s=seen, s=seen_at), landed, prediction.x0


def judge_landings(judge: Judge, step: Transition, landings: Sequence[Batch]) -> list[Tensor]:
    """Return the logits of several landings of a step from the same x_t.

    All go through the encoder in one batch, and x_t, if the discriminator is conditional, once.
    """
    before, after = _features(judge, step, landings)
    return [judge.judge(before, features) for features in after]


def judge_fake(judge: Judge, step: Transition, beside: Sequence[Batch] = ()) -> list[Tensor]:
    """Return the logits of the student's landing, with a gradient for the student, and of others.

    Args:
        judge: the discriminator.
        step: the student's.
        beside: other landings from the same x_t, which need no gradient, as x_t needs none.
    """
    before: Sequence[Tensor] | None = None
    logits: list[Tensor] = []
    if beside or judge.conditional:
        with torch.no_grad():
            before, others = _features(judge, step, beside)
            logits = [judge.judge(before, features) for features in others]
    after = judge.features(step.x_s, step.s, step.conditioning)
    return [judge.judge(before, after), *logits]


def _features(
    judge: Judge, step: Transition, landings: Sequence[Batch]
) -> tuple[Sequence[Tensor] | None, list[Sequence[Tensor]]]:
    """Return the features of x_t, None for an unconditional judge, and those of landings."""
    latents = list(landings)
    times = [step.s] * len(landings)
    if judge.conditional:
        latents.append(step.x_t)
        times.append(step.t)
    conditioning = Conditioning.cat([step.conditioning] * len(latents))
    features = judge.features(torch.cat(latents), torch.cat(times), conditioning)
    levels = [level.chunk(len(latents)) for level in features]
    parts: list[Sequence[Tensor]] = [list(part) for part in zip(*levels, strict=True)]
    return parts[-1] if judge.conditional else None, parts[: len(landings)]


def _rolled(conditioning: Conditioning) -> Conditioning:
    """Return a copy in which every item has the prompt of the one before it."""
    order = torch.arange(len(conditioning)).roll(1)
    return conditioning[sent(order, conditioning.text.device)]
