"""Latent adversarial diffusion distillation: LADD (arXiv 2403.12015), of SD3-Turbo.

The discriminator is the frozen teacher with a small head on every level of its features. Student
and real latents are noised again to one time, alike, and the heads tell them apart there; the time
is drawn by a logit-normal law of the noise, which decides whether structure or detail is judged.
There is no decoder, no other feature network, and with good real latents no distillation loss.

What is real is a setting. `real = "teacher"` lets the teacher draw the prompts of every batch anew
in `teacher_steps` steps under the stage's guidance, as the paper does beforehand. The cheap way to
the same is a cache of prompts, which the teacher draws once (`twostep cache prompts.txt`), with
`real = "data"`.

Definitions after the paper's section 3 and open implementations of it: hinge loss; student times
in four steps 1, 3/4, 1/2 and 1/4 of the way, the two lower ones alone for the first iterations and
then pure noise in 70 % of all draws. The law is said of log(sigma / alpha), so it means the same in
a variance-preserving schedule. Here the heads are on the encoder's levels and the mid-block of a
UNet, where the paper has them after the attention blocks of a transformer; and real and fake of one
item get the same noise, so that this tells nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twostep.diffusion import Schedule, sample, trailing_times
from twostep.diffusion.shapes import Batch, Time, Times
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Method,
    MethodSettings,
    Models,
    check_warmup,
)
from twostep.distill.methods.heads import (
    NUM_TIME_FEATURES,
    Heads,
    HeadSettings,
    TeacherFeatures,
    heads_role,
    hinge_of_student,
    loss_of_heads,
    told_time,
)
from twostep.distill.methods.renoising import refuse_teacher_steps, renoising_contract
from twostep.distill.pairs import Batches
from twostep.distill.roles import OptimiserSettings, Role, learner
from twostep.distill.times import draw_logit_normal_times, draw_weighted_times
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

_WEIGHT_OF_NOISE = 0.7
"""Share of draws in which the student starts at pure noise, after the first iterations."""


class LaddSettings(HeadSettings):
    """The settings of latent adversarial distillation."""

    name: str = "ladd"
    real: Literal["data", "teacher"] = Field(
        "data", description="what is real: the data, or what the teacher draws in teacher_steps"
    )
    noise_mean: float = Field(
        1.0, description="mean of log(sigma / alpha) where latents are judged; 1 in the paper"
    )
    noise_deviation: float = Field(1.0, gt=0, description="its deviation; 1 in the paper")
    low_noise_iterations: int = Field(
        500, ge=0, description="iterations in which the student starts at its lower times alone"
    )


@dataclass(frozen=True, eq=False)
class JudgedLatents:
    """Real latents and the student's, noised alike.

    Args:
        real: noised.
        fake: the student's, noised, with gradient.
        t: times to which they are noised, on the CPU.
        conditioning: what both are to show.
    """

    real: Batch
    fake: Batch
    t: Times
    conditioning: Conditioning


class Ladd(Method[JudgedLatents]):
    """Student against heads on the frozen teacher's features."""

    name: ClassVar[str] = "ladd"
    Settings: ClassVar[type[MethodSettings]] = LaddSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        assert isinstance(stage.method, LaddSettings)
        self.stage = stage
        self.settings = stage.method
        check_warmup("heads_warmup", self.settings.heads_warmup, stage.iterations)
        if self.settings.real == "data":
            refuse_teacher_steps(stage)
        elif stage.teacher_steps is None:
            raise ValueError('real = "teacher" needs teacher_steps: in how many steps it draws')
        self._frozen: TeacherFeatures | None = None

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Student and heads learn."""
        self._frozen = TeacherFeatures(teacher)
        heads = heads_role(
            self.stage,
            self.settings,
            self._frozen.widths,
            condition_width=teacher.backbone.spec.pooled_width + NUM_TIME_FEATURES,
            device=teacher.device,
        )
        return {"student": learner(student, OptimiserSettings.of(self.stage)), "heads": heads}

    def draw(
        self, iteration: int, batches: Batches, models: Models, random: Randomness
    ) -> JudgedLatents:
        """Let the student answer at one of its times, and noise its answer and the real one."""
        student: Denoiser = models["student"]
        schedule = student.schedule
        x0, conditioning = batches.examples(random)
        if self.settings.real == "teacher":
            x0 = self._drawn_by(models["teacher"], x0, conditioning, batches, random)
        times = trailing_times(self.stage.student_steps, schedule)
        weights = start_weights(
            len(times), low_noise=iteration < self.settings.low_noise_iterations
        )
        s = batches.share(draw_weighted_times(times, weights, batches.batch_size, random.tensors))
        x_s = schedule.add_noise(x0, batches.noise(x0, random), s)
        with torch.set_grad_enabled("student" in self.turns(iteration)):
            fake = student(x_s, s, conditioning).x0
        t = batches.share(self._judged_times(batches.batch_size, random.tensors, schedule))
        eps = batches.noise(x0, random)
        return JudgedLatents(
            real=schedule.add_noise(x0, eps, t),
            fake=schedule.add_noise(fake, eps, t),
            t=t,
            conditioning=conditioning,
        )

    def _drawn_by(
        self,
        teacher: Denoiser,
        like: Batch,
        conditioning: Conditioning,
        batches: Batches,
        random: Randomness,
    ) -> Batch:
        """Return what the teacher draws for the same prompts from new noise."""
        assert self.stage.teacher_steps is not None
        empty = batches.empty(conditioning)
        denoise = teacher.with_guidance(conditioning, empty, self.stage.guidance)
        noise = batches.noise(like, random)
        with torch.no_grad():
            return sample(denoise, noise, self.stage.teacher_steps, teacher.schedule)

    def _judged_times(self, count: int, generator: torch.Generator, schedule: Schedule) -> Times:
        return draw_logit_normal_times(
            count,
            generator,
            schedule,
            mean=self.settings.noise_mean,
            deviation=self.settings.noise_deviation,
        )

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the heads, and after their warm-up the student."""
        return self.settings.turns_at(iteration)

    def loss(self, role: str, pair: JudgedLatents, models: Models) -> Mapping[str, Tensor]:
        """Return the hinge loss of either side."""
        heads: Heads = models["heads"]
        condition = self._condition(pair, models["teacher"])
        assert self._frozen is not None
        if role == "student":
            features = self._frozen(pair.fake, pair.t, pair.conditioning)
            return {"total": hinge_of_student(heads(features, condition))}
        with torch.no_grad():
            real_features = self._frozen(pair.real, pair.t, pair.conditioning)
            fake_features = self._frozen(pair.fake.detach(), pair.t, pair.conditioning)
        return loss_of_heads(
            heads,
            real_features,
            fake_features,
            condition,
            r1_weight=self.settings.feature_r1_weight,
        )

    def _condition(self, pair: JudgedLatents, teacher: Denoiser) -> Tensor:
        """Return what the heads are told: the prompt, and how noisy what they see is."""
        pooled = pair.conditioning.pooled.float()
        told = told_time(pair.t, teacher.schedule.top, pooled.device)
        width = teacher.backbone.spec.pooled_width
        return torch.cat([pooled[:, :width], told], dim=1)

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: x0 and fresh noise, along the trailing grid."""
        steps = self.stage.student_steps
        times: tuple[Time, ...] = trailing_times(steps, last_student.schedule)
        return renoising_contract(last_student, steps, visited=times, trained=times)

    def cost(self) -> Cost:
        """Return the teacher's drawing, if it draws; passes of its encoder are not counted."""
        num_calls = self.stage.teacher_steps or 0
        return Cost(num_calls * (2 if self.stage.guidance > 1 else 1))


def start_weights(num_times: int, *, low_noise: bool) -> tuple[float, ...]:
    """Return how often a student starts at each of its falling times.

    Of four times (0, 0, 1/2, 1/2) in the first iterations, and (0.7, 0.1, 0.1, 0.1) then; of others
    the lower half alike, and the rest alike. A single time is always drawn.

    Args:
        num_times: of the student's grid.
        low_noise: whether these are the first iterations.
    """
    if num_times == 1:
        return (1.0,)
    if low_noise:
        num_high = num_times // 2
        num_low = num_times - num_high
        return (0.0,) * num_high + (1 / num_low,) * num_low
    rest = (1 - _WEIGHT_OF_NOISE) / (num_times - 1)
    return (_WEIGHT_OF_NOISE,) + (rest,) * (num_times - 1)
