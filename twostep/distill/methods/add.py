"""Adversarial distillation on frozen features, "ADD-style": after SDXL-Turbo (arXiv 2311.17042).

The student is shown data noised to one of its own few times and says x0. Heads on the features of
a frozen network tell its answers from the data (section 3.2, hinge loss with R1 on the heads'
inputs), and the teacher pulls it by score distillation: the student's x0 is noised again, the
teacher says x0 there, and the distance of both is weighted with alpha_t (section 3.3, the
"exponential" weighting).

It is called ADD-style because the features are others. The paper's come from DINOv2 ViT-S and its
picture condition from DINOv2 ViT-L, whose weights no package here brings. Instead of them:

- `features = "judge"`: all levels of nano's judge, on pictures that the teacher's codec decodes.
  Whoever then measures the student by that same judge measures what it was trained on.
- `features = "teacher"`: all encoder levels of the teacher and its mid-block, on clean latents.

The heads are told the pooled text; the condition on the picture is left out. Where an equation of
the paper was not at hand, the definitions are those that independent re-implementations agree on:
4 steps at equal distances up to pure noise, lambda = 2.5, R1 weight 1e-5. The distance of the score
distillation is taken on latents, as a mean over values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twostep.diffusion import trailing_times
from twostep.diffusion.shapes import Batch, Times, as_column
from twostep.distill.method import (
    ContractChanges,
    Cost,
    Method,
    MethodSettings,
    Models,
    check_warmup,
)
from twostep.distill.methods.heads import (
    Heads,
    HeadSettings,
    JudgeFeatures,
    TeacherFeatures,
    heads_role,
    hinge_of_student,
    loss_of_heads,
)
from twostep.distill.methods.renoising import refuse_teacher_steps, renoising_contract
from twostep.distill.pairs import Batches
from twostep.distill.roles import OptimiserSettings, Role, learner
from twostep.distill.times import draw_uniform_times, draw_weighted_times
from twostep.evaluate.judge import load_judge
from twostep.media.codec import Codec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.memory import is_metered

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage


class AddSettings(HeadSettings):
    """The settings of ADD-style distillation."""

    name: str = "add"
    features: Literal["teacher", "judge"] = Field(
        "teacher", description="what the heads look through: the teacher's encoder, or nano's judge"
    )
    distillation_weight: float = Field(
        2.5, ge=0, description="weight of the teacher's pull; 2.5 in the paper"
    )


@dataclass(frozen=True, eq=False)
class Answer:
    """What the student said, and what it is compared with.

    Args:
        x0: data.
        fake: the student's x0, with gradient.
        t: times to which its answer is noised for the teacher, on the CPU.
        eps: that noise.
        conditioning: what all is to show.
        empty: the conditioning of the empty prompt for the same items.
        codec: of the teacher; None if it has none.
    """

    x0: Batch
    fake: Batch
    t: Times
    eps: Batch
    conditioning: Conditioning
    empty: Conditioning
    codec: Codec | None


class Add(Method[Answer]):
    """Student against heads on frozen features, with the teacher's pull."""

    name: ClassVar[str] = "add"
    Settings: ClassVar[type[MethodSettings]] = AddSettings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        refuse_teacher_steps(stage)
        assert isinstance(stage.method, AddSettings)
        self.stage = stage
        self.settings = stage.method
        check_warmup("heads_warmup", self.settings.heads_warmup, stage.iterations)
        self._frozen: JudgeFeatures | TeacherFeatures | None = None

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Student and heads learn; the network under the heads stays as it is."""
        self._frozen = TeacherFeatures(teacher)
        if self.settings.features == "judge":
            is_plan = is_metered(next(teacher.network.parameters()))
            self._frozen = JudgeFeatures(load_judge(outline=is_plan).to(teacher.device))
        heads = heads_role(
            self.stage,
            self.settings,
            self._frozen.widths,
            condition_width=teacher.backbone.spec.pooled_width,
            device=teacher.device,
        )
        return {"student": learner(student, OptimiserSettings.of(self.stage)), "heads": heads}

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> Answer:
        """Let the student answer at one of its times, and draw where the teacher is asked."""
        student: Denoiser = models["student"]
        schedule = student.schedule
        x0, conditioning = batches.examples(random)
        times = trailing_times(self.stage.student_steps, schedule)
        alike = (1.0,) * len(times)
        s = batches.share(draw_weighted_times(times, alike, batches.batch_size, random.tensors))
        x_s = schedule.add_noise(x0, batches.noise(x0, random), s)
        t = batches.share(draw_uniform_times(batches.batch_size, random.tensors, schedule))
        eps = batches.noise(x0, random)
        with torch.set_grad_enabled("student" in self.turns(iteration)):
            fake = student(x_s, s, conditioning).x0
        return Answer(
            x0=x0,
            fake=fake,
            t=t,
            eps=eps,
            conditioning=conditioning,
            empty=batches.empty(conditioning),
            codec=batches.codec,
        )

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the heads, and after their warm-up the student."""
        return self.settings.turns_at(iteration)

    def loss(self, role: str, pair: Answer, models: Models) -> Mapping[str, Tensor]:
        """Return the hinge loss of either side, the student's with the teacher's pull."""
        heads: Heads = models["heads"]
        condition = pair.conditioning.pooled
        if role == "student":
            adversarial = hinge_of_student(heads(self._features(pair.fake, pair), condition))
            pull = score_distillation_loss(
                pair, teacher=models["teacher"], guidance=self.stage.guidance
            )
            total = adversarial + self.settings.distillation_weight * pull
            return {"total": total, "adversarial": adversarial, "distillation": pull}
        with torch.no_grad():
            real_features = self._features(pair.x0, pair)
            fake_features = self._features(pair.fake.detach(), pair)
        return loss_of_heads(
            heads,
            real_features,
            fake_features,
            condition,
            r1_weight=self.settings.feature_r1_weight,
        )

    def _features(self, latents: Batch, pair: Answer) -> list[Tensor]:
        """Return the frozen features of clean latents, with a gradient for these."""
        assert self._frozen is not None
        if isinstance(self._frozen, TeacherFeatures):
            lowest = torch.full_like(pair.t, self._frozen.teacher.schedule.lowest)
            return self._frozen(latents, lowest, pair.conditioning)
        if pair.codec is None:
            raise ValueError('features = "judge" needs a teacher with a codec')
        return self._frozen(latents, pair.codec)

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: x0 and fresh noise, along the trailing grid."""
        steps = self.stage.student_steps
        times = trailing_times(steps, last_student.schedule)
        return renoising_contract(last_student, steps, visited=times, trained=times)

    def cost(self) -> Cost:
        """Return the teacher's one answer; passes of an encoder for features are not counted."""
        return Cost(2 if self.stage.guidance > 1 else 1)


def score_distillation_loss(pair: Answer, *, teacher: Denoiser, guidance: float) -> Tensor:
    """Return E alpha_t |fake - x0_teacher(alpha_t fake + sigma_t eps, t)|^2, the mean over values.

    No gradient goes through the teacher (section 3.3 of arXiv 2311.17042).

    Args:
        pair: the student's answer, and what it is noised with.
        teacher: says where it sees the noised answer.
        guidance: its scale; 1 is none.
    """
    schedule = teacher.schedule
    with torch.no_grad():
        x_t = schedule.add_noise(pair.fake.detach(), pair.eps, pair.t)
        denoise = teacher.with_guidance(pair.conditioning, pair.empty, guidance)
        seen = denoise(x_t, pair.t).x0
    alpha, _ = schedule.coefficients(pair.t, pair.fake)
    squares = (pair.fake - seen).float().square()
    return (as_column(alpha.flatten(), squares) * squares).mean()
