"""Improved distribution matching distillation: DMD2 (arXiv 2405.14867).

Definitions are those of the paper and of its published code for SDXL. Three networks take part: the
student, the frozen teacher as the real score, and a fake score that starts as the teacher and
follows what the student makes. In every iteration the student draws as it will when it samples, by
*backward simulation*: one of its steps is chosen, the steps before it run without gradient from
pure noise, and the chosen one says x0. Then

- the fake score learns to denoise x0, and a head on its mid-block to tell x0 from data, both noised
  (non-saturating loss, weight 1e-2), in every iteration;
- the student learns in every `fake_turns`-th one, from the distribution matching gradient
  (`matching`) and from the head (weight 5e-3).

So a stage's `iterations` count steps of the fake score, and `fake_turns` times fewer steps of the
student. Real data are needed by the head alone; with `gan_weight = 0` only prompts are.

A student of one step is conditioned at 40 % of the way, 399 of 999 in the code, in place of the
top: there it sees pure noise, but answers with x0 of a time at which eps says something of it. That
start is first learnt by regression on the teacher's own landings, in `regression_iterations`
iterations, in each of which the teacher takes `teacher_steps` steps from the same noise and the
student learns.

What differs: the head is smaller and judges every place of the mid-block, where theirs has 105
million parameters and one logit; with `lora_rank` the fake score is a LoRA on the shared base,
whose alpha is its rank (theirs is 8 at rank 64).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion import Prediction, Schedule, sample, trailing_times
from twostep.diffusion.samplers import renoised_input
from twostep.diffusion.shapes import Batch, Time, Times
from twostep.distill.method import ContractChanges, Cost, Method, MethodSettings, Models
from twostep.distill.methods.heads import Head, picture_widths
from twostep.distill.methods.matching import (
    distribution_matching_loss,
    draw_matching_times,
    fake_score_loss,
)
from twostep.distill.methods.renoising import refuse_teacher_steps, renoising_contract
from twostep.distill.pairs import Batches
from twostep.distill.roles import OptimiserSettings, Role, learner, place_lora
from twostep.distill.times import draw_uniform_times
from twostep.networks.adapters import remove_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.recipe import WHILE_RUNNING

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

_ONE_STEP_SHARE = 0.4
"""Where a student of one step is conditioned, as a share of the way."""


class Dmd2Settings(MethodSettings):
    """The settings of distribution matching distillation."""

    name: str = "dmd2"
    fake_turns: int = Field(
        5, gt=0, description="steps of the fake score for each of the student; 5 in the paper"
    )
    gan_weight: float = Field(
        5e-3, ge=0, description="weight of the head in the student's loss; 0 is no head at all"
    )
    head_weight: float = Field(
        1e-2, ge=0, description="weight of the head's own loss beside the fake score's"
    )
    fake_learning_rate: float | None = Field(
        None,
        gt=0,
        description="of fake score and head; as learning_rate where not given",
        json_schema_extra=WHILE_RUNNING,
    )
    regression_iterations: int = Field(
        0, ge=0, description="first iterations, of one step: regression on the teacher's landings"
    )
    head_width: int = Field(64, gt=0, multiple_of=8, description="channels inside the head")


@runtime_checkable
class FakeWeights(Protocol):
    """What estimates the score of the student's pictures, and judges them: module or LoRA."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return x0 and eps as the fake score sees them."""

    def logits(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the head's logits [batch, places], high for data."""


@dataclass(frozen=True, eq=False)
class FakeScore:
    """The fake score as the losses call it.

    Args:
        weights: what is trained.
    """

    weights: FakeWeights

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Predict x0 and eps of the student's pictures."""
        return Prediction(*self.weights.predict(x_t, t, conditioning))

    def logits(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the head's logits [batch, places], high for data."""
        return self.weights.logits(x_t, t, conditioning)


class _DenoiserWithHead:
    """How every fake score answers."""

    head: nn.Module
    _denoiser: Denoiser

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Return x0 and eps."""
        prediction = self._denoiser(x_t, t, conditioning)
        return prediction.x0, prediction.eps

    def logits(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the head's logits [batch, places]."""
        logits: Tensor = self.head(self._denoiser.features(x_t, t, conditioning)[-1])
        return logits


class OwnFakeScore(_DenoiserWithHead, nn.Module):
    """A copy of the teacher with a head on its mid-block, trained whole."""

    METHODS = ("predict", "logits")
    """The methods by which it is called."""

    def __init__(self, teacher: Denoiser, *, head_width: int | None) -> None:
        """Copy the teacher, its LoRA merged in; it stays as it is.

        Args:
            teacher: gives the start.
            head_width: channels inside the head; None for no head.
        """
        super().__init__()
        self._denoiser = teacher.standalone()
        self.network = self._denoiser.network.requires_grad_(True)
        self.head = _make_head(teacher, head_width)

    def checkpoint_gradients(self) -> None:
        """Recompute blocks in the backward pass instead of keeping activations."""
        self._denoiser.checkpoint_gradients(True)


class LoraFakeScore(_DenoiserWithHead):
    """The same as a LoRA on the teacher's network, so that the base is there once."""

    NAME = "fake-score"

    def __init__(self, teacher: Denoiser, *, rank: int, head_width: int | None) -> None:
        """Put the LoRA on the teacher's network; whatever could be trained there still can be.

        Args:
            teacher: gives the start.
            rank: of the LoRA.
            head_width: channels inside the head; None for no head.
        """
        self.lora = place_lora(teacher, self.NAME, rank=rank)
        self._denoiser = replace(teacher, lora=self.NAME)
        self.head = _make_head(teacher, head_width)

    def remove(self) -> None:
        """Take the LoRA off the teacher's network."""
        remove_lora(self._denoiser.network, self.NAME)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the LoRA and of the head."""
        yield from self.lora.parameters()
        yield from self.head.parameters()

    def requires_grad_(self, requires_grad: bool) -> None:
        """Let gradients flow into the LoRA and the head, or not."""
        self.lora.requires_grad_(requires_grad)
        self.head.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the LoRA and of the head."""
        return {"lora": self.lora.state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.lora.load_state_dict(state_dict["lora"])
        self.head.load_state_dict(state_dict["head"])


def _make_head(teacher: Denoiser, hidden: int | None) -> nn.Module:
    """Return a head on the teacher's mid-block, made on the CPU so that it starts the same."""
    if hidden is None:
        return nn.Sequential()
    width = picture_widths(teacher)[-1]
    return Head(width, hidden=hidden).to(teacher.device)


@dataclass(frozen=True, eq=False)
class Noised:
    """Where clean latents are looked at again: the noise, and the time that it belongs to."""

    eps: Batch
    t: Times


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the student drew, and how it is looked at.

    Args:
        x: the student's x0; with gradient in its own iterations.
        x0: data.
        conditioning: what both are to show.
        empty: the conditioning of the empty prompt for the same items.
        matching: where both scores are compared.
        denoising: where the fake score learns.
        judged: where the head sees the student's x0.
        judged_real: where the head sees data.
        landing: where the teacher lands from the same noise; None after the regression.
    """

    x: Batch
    x0: Batch
    conditioning: Conditioning
    empty: Conditioning
    matching: Noised
    denoising: Noised
    judged: Noised
    judged_real: Noised
    landing: Batch | None


class Dmd2(Method[Drawn]):
    """Student against the difference of two scores, and a head on the fake one."""

    name: ClassVar[str] = "dmd2"
    Settings: ClassVar[type[MethodSettings]] = Dmd2Settings

    def __init__(self, stage: Stage) -> None:
        """Take the settings of a stage."""
        assert isinstance(stage.method, Dmd2Settings)
        self.stage = stage
        self.settings = stage.method
        if self.settings.regression_iterations == 0:
            refuse_teacher_steps(stage)
        elif stage.student_steps > 1:
            raise ValueError(
                "regression_iterations are for students of one step: others start where the "
                "teacher's own answers are right already"
            )
        elif stage.teacher_steps is None:
            raise ValueError(
                "regression_iterations need teacher_steps: in how many the teacher lands"
            )

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        """Student and fake score learn."""
        optimiser = OptimiserSettings.of(self.stage, learning_rate=self.settings.fake_learning_rate)
        width = self.settings.head_width if self.settings.gan_weight > 0 else None
        if self.stage.lora_rank is not None:
            # The shared base recomputes its blocks already, if the student does.
            adapter = LoraFakeScore(teacher, rank=self.stage.lora_rank, head_width=width)
            fake = Role(FakeScore(adapter), adapter, optimiser, remove=adapter.remove)
        else:
            own = OwnFakeScore(teacher, head_width=width)
            if self.stage.gradient_checkpointing:
                own.checkpoint_gradients()
            fake = Role(FakeScore(own), own, optimiser, sharded_methods=OwnFakeScore.METHODS)
        return {"student": learner(student, OptimiserSettings.of(self.stage)), "fake": fake}

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> Drawn:
        """Let the student draw up to one of its steps, and draw all noise of the iteration."""
        student: Denoiser = models["student"]
        schedule = student.schedule
        x0, conditioning = batches.examples(random)
        empty = batches.empty(conditioning)
        noise = batches.noise(x0, random)
        times = visited_times(self.stage.student_steps, schedule)
        # One step for the whole batch, so that no network call is made for nothing.
        index = random.words.randrange(len(times))
        with torch.no_grad():
            x_t = renoised_input(
                student.with_conditioning(conditioning),
                noise,
                times,
                index,
                schedule,
                lambda i: batches.noise(x0, random),
            )
        t = torch.full((len(x0),), times[index])
        with torch.set_grad_enabled(self._is_students(iteration)):
            x = student(x_t, t, conditioning).x0
        landing = None
        if iteration < self.settings.regression_iterations:
            landing = self._teacher_landing(models["teacher"], noise, conditioning, empty)

        def noised(t: Times) -> Noised:
            return Noised(batches.noise(x0, random), batches.share(t))

        count, generator = batches.batch_size, random.tensors
        return Drawn(
            x=x,
            x0=x0,
            conditioning=conditioning,
            empty=empty,
            matching=noised(draw_matching_times(count, generator, schedule)),
            denoising=noised(draw_uniform_times(count, generator, schedule)),
            judged=noised(draw_uniform_times(count, generator, schedule)),
            judged_real=noised(draw_uniform_times(count, generator, schedule)),
            landing=landing,
        )

    def _teacher_landing(
        self, teacher: Denoiser, noise: Batch, conditioning: Conditioning, empty: Conditioning
    ) -> Batch:
        """Return where the teacher's flow leads from the student's own noise."""
        assert self.stage.teacher_steps is not None
        denoise = teacher.with_guidance(conditioning, empty, self.stage.guidance)
        with torch.no_grad():
            return sample(denoise, noise, self.stage.teacher_steps, teacher.schedule)

    def _is_students(self, iteration: int) -> bool:
        is_regression = iteration < self.settings.regression_iterations
        return is_regression or iteration % self.settings.fake_turns == 0

    def turns(self, iteration: int) -> Sequence[str]:
        """Return the fake score, and in every `fake_turns`-th iteration then the student."""
        return ("fake", "student") if self._is_students(iteration) else ("fake",)

    def loss(self, role: str, pair: Drawn, models: Models) -> Mapping[str, Tensor]:
        """Return the denoising loss with the head's, or the student's matching with the head's."""
        fake: FakeScore = models["fake"]
        teacher: Denoiser = models["teacher"]
        if role == "student":
            return self._student_loss(pair, fake, teacher)
        denoising = fake_score_loss(
            pair.x,
            pair.conditioning,
            pair.denoising.t,
            pair.denoising.eps,
            fake=fake,
            schedule=teacher.schedule,
        )
        if self.settings.gan_weight == 0:
            return {"total": denoising}
        schedule = teacher.schedule
        on_fake = _judged(fake, pair.x.detach(), pair.judged, pair.conditioning, schedule)
        on_real = _judged(fake, pair.x0, pair.judged_real, pair.conditioning, schedule)
        head = softplus(on_fake).mean() + softplus(-on_real).mean()
        return {
            "total": denoising + self.settings.head_weight * head,
            "denoising": denoising,
            "head": head,
            "gap": on_real.mean() - on_fake.mean(),
        }

    def _student_loss(
        self, pair: Drawn, fake: FakeScore, teacher: Denoiser
    ) -> Mapping[str, Tensor]:
        if pair.landing is not None:
            return {"total": (pair.x - pair.landing).float().square().mean()}
        matching = distribution_matching_loss(
            pair.x,
            pair.conditioning,
            pair.matching.t,
            pair.matching.eps,
            teacher=teacher,
            fake=fake,
            guidance=self.stage.guidance,
            empty=pair.empty,
        )
        if self.settings.gan_weight == 0:
            return {"total": matching}
        logits = _judged(fake, pair.x, pair.judged, pair.conditioning, teacher.schedule)
        adversarial = softplus(-logits).mean()
        return {
            "total": matching + self.settings.gan_weight * adversarial,
            "matching": matching,
            "adversarial": adversarial,
        }

    def describe(self, last_student: Denoiser) -> ContractChanges:
        """Return the contract's changes: x0 and fresh noise, at the times that it was drawn at."""
        steps = self.stage.student_steps
        times = visited_times(steps, last_student.schedule)
        return renoising_contract(last_student, steps, visited=times, trained=times)

    def cost(self) -> Cost:
        """Return the teacher's answers, of which only the student's iterations ask for one."""
        per_answer = 2 if self.stage.guidance > 1 else 1
        num_landings = self.settings.regression_iterations * (self.stage.teacher_steps or 0)
        matched = max(0, self.stage.iterations - self.settings.regression_iterations)
        num_answers = matched / self.settings.fake_turns + num_landings
        return Cost(per_answer * num_answers / self.stage.iterations)


def visited_times(steps: int, schedule: Schedule) -> tuple[Time, ...]:
    """Return the times at which a student of so many steps is asked, falling.

    Those of the trailing grid, in the code 999, 749, 499 and 249; of one step 40 % of the way, 399.
    """
    if steps == 1:
        return (schedule.time_at(_ONE_STEP_SHARE),)
    return trailing_times(steps, schedule)


def _judged(
    fake: FakeScore, x: Batch, noised: Noised, conditioning: Conditioning, schedule: Schedule
) -> Tensor:
    """Return the head's logits of clean latents, noised."""
    return fake.logits(schedule.add_noise(x, noised.eps, noised.t), noised.t, conditioning)
