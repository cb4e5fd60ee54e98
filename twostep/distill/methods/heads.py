"""Heads on frozen features: discriminators of which only the last few layers learn.

ADD (arXiv 2311.17042) judges pictures by the features of a frozen network, LADD (arXiv 2403.12015)
latents by those of the frozen teacher. Both put a small head on every level of these features, and
let student and heads play for the hinge loss. A head is written anew here: convolutions with group
normalisation where StyleGAN-T's, which ADD uses, have spectral normalisation. What is conditioned
on is projected onto the head's features (arXiv 1802.05637). Heads compute in float32 whatever the
stage's precision is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from twostep.diffusion.shapes import Time, Times, sent
from twostep.distill.method import MethodSettings
from twostep.distill.roles import OptimiserSettings, Role
from twostep.evaluate.judge import Judge
from twostep.media.codec import Codec, DecodesWithGradient
from twostep.networks.backbone import BackboneError
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.recipe import WHILE_RUNNING

if TYPE_CHECKING:
    from twostep.distill.recipe import Stage

Features = Sequence[Tensor]
"""Levels of features, each [batch, width, rows, columns]."""

Logits = list[Tensor]
"""One tensor of logits [batch, places] per head, high for what is real."""

NUM_TIME_FEATURES = 16
"""Numbers in which a head is told the time."""

_PICTURE_SIDES = 2
_NUM_GROUPS = 8
_SLOPE = 0.2
"""Of the leaky ReLUs."""


class HeadSettings(MethodSettings):
    """The settings of methods that judge by heads on frozen features."""

    feature_r1_weight: float = Field(
        1e-5, ge=0, description="weight of the R1 penalty on the heads' inputs; 1e-5 in ADD's paper"
    )
    heads_learning_rate: float | None = Field(
        None,
        gt=0,
        description="as learning_rate where not given",
        json_schema_extra=WHILE_RUNNING,
    )
    head_width: int = Field(64, gt=0, multiple_of=8, description="channels inside every head")
    heads_warmup: int = Field(
        0,
        ge=0,
        description="iterations at the start in which the heads learn alone; the papers have none, "
        "but a student that follows fresh heads at once may collapse",
    )

    def turns_at(self, iteration: int) -> tuple[str, ...]:
        """Return the heads, then the student, which faces those that have just learned."""
        return ("heads",) if iteration < self.heads_warmup else ("heads", "student")


class Head(nn.Module):
    """Maps one level of features to a logit at every place."""

    def __init__(self, width: int, *, hidden: int, condition_width: int = 0) -> None:
        """Make a fresh head.

        Args:
            width: channels of the features.
            hidden: channels inside the head, a multiple of 8.
            condition_width: numbers of the condition that is projected onto them; 0 for none.
        """
        super().__init__()
        self.narrow = nn.Sequential(
            nn.GroupNorm(1, width, affine=False),
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.GroupNorm(_NUM_GROUPS, hidden),
            nn.LeakyReLU(_SLOPE),
        )
        self.refine = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GroupNorm(_NUM_GROUPS, hidden),
            nn.LeakyReLU(_SLOPE),
        )
        self.to_logit = nn.Conv2d(hidden, 1, 1)
        self.project = nn.Linear(condition_width, hidden) if condition_width else None

    def forward(
        self,
        features: Float[Tensor, "batch width rows columns"],
        condition: Float[Tensor, "batch numbers"] | None = None,
    ) -> Float[Tensor, "batch places"]:
        """Return the logits in float32."""
        with torch.autocast(features.device.type, enabled=False):
            hidden = self.narrow(features.float())
            hidden = hidden + self.refine(hidden)
            logits: Tensor = self.to_logit(hidden)
            if self.project is not None and condition is not None:
                direction = self.project(condition.float())[:, :, None, None]
                scale = hidden.shape[1] ** -0.5
                logits = logits + scale * (direction * hidden).sum(dim=1, keepdim=True)
            return logits.flatten(1)


class Heads(nn.Module):
    """One head per level of features."""

    def __init__(self, widths: Sequence[int], *, hidden: int, condition_width: int = 0) -> None:
        """Make fresh heads.

        Args:
            widths: channels of every level.
            hidden: channels inside every head.
            condition_width: numbers of the condition; 0 for none.
        """
        super().__init__()
        self.heads = nn.ModuleList(
            Head(width, hidden=hidden, condition_width=condition_width) for width in widths
        )

    def forward(self, features: Features, condition: Tensor | None = None) -> Logits:
        """Return the logits of every head.

        Args:
            features: one level per head.
            condition: what all heads are told [batch, condition_width]; None if nothing.
        """
        pairs = zip(self.heads, features, strict=True)
        return [head(level, condition) for head, level in pairs]


def heads_role(
    stage: Stage,
    settings: HeadSettings,
    widths: Sequence[int],
    *,
    condition_width: int,
    device: torch.device,
) -> Role:
    """Return the role of fresh heads.

    Args:
        stage: says how they learn, as far as the method does not.
        settings: of the method.
        widths: channels of every level of the features.
        condition_width: numbers of what they are told.
        device: where they are.
    """
    heads = Heads(widths, hidden=settings.head_width, condition_width=condition_width).to(device)
    return Role(
        heads, heads, OptimiserSettings.of(stage, learning_rate=settings.heads_learning_rate)
    )


def picture_widths(teacher: Denoiser) -> tuple[int, ...]:
    """Return the channels of every level of a teacher's features, on which heads here can stand.

    Raises:
        BackboneError: the features have other sides than height and width.
    """
    spec = teacher.backbone.spec
    if spec.feature_sides != _PICTURE_SIDES:
        raise BackboneError(
            f"the heads of this method stand on features with height and width, and those of the "
            f'family {spec.family} have {spec.feature_sides} sides. Take the method "adversarial" '
            'or "lightning".'
        )
    return spec.feature_widths


class TeacherFeatures:
    """The levels of a frozen teacher's encoder, and its mid-block's, on noisy latents."""

    def __init__(self, teacher: Denoiser) -> None:
        self.teacher = teacher

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return picture_widths(self.teacher)

    def __call__(self, x_t: Tensor, t: Times, conditioning: Conditioning) -> list[Tensor]:
        """Return the features, with a gradient for the latents."""
        return self.teacher.features(x_t, t, conditioning)


class JudgeFeatures:
    """The levels of the judge's body on pictures, decoded from clean latents.

    Pictures of another size than the judge's are scaled to it.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level."""
        return self.judge.channels

    def __call__(self, latents: Tensor, codec: Codec) -> list[Tensor]:
        """Return the features, with a gradient for the latents.

        Raises ValueError for a codec through which no gradient comes.
        """
        if not isinstance(codec, DecodesWithGradient) or codec.media != "image":
            raise ValueError(
                'features = "judge" needs a codec of pictures with a method '
                'decode_with_gradient; use features = "teacher"'
            )
        pictures = codec.decode_with_gradient(latents)
        size = (self.judge.pixels, self.judge.pixels)
        if tuple(pictures.shape[-2:]) != size:
            pictures = interpolate(pictures, size=size, mode="bilinear", antialias=True)
        return self.judge.levels(pictures)


def told_time(t: Times, top: Time, device: torch.device) -> Float[Tensor, "batch 16"]:
    """Return times as sines and cosines of falling wavelengths, for heads.

    Args:
        t: one time per item.
        top: of the schedule.
        device: where the heads are.
    """
    shares = t.to(torch.float32) / top
    octaves = 2.0 ** torch.arange(NUM_TIME_FEATURES // 2)
    phases = torch.pi * shares[:, None] * octaves
    return sent(torch.cat([phases.sin(), phases.cos()], dim=1), device)


def hinge_of_heads(real: Logits, fake: Logits) -> Tensor:
    """Return what heads minimise: sum over them of E max(0, 1 - real) + E max(0, 1 + fake)."""
    pairs = zip(real, fake, strict=True)
    return torch.stack([(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in pairs]).sum()


def loss_of_heads(
    heads: Heads, real: Features, fake: Features, condition: Tensor | None, r1_weight: float
) -> Mapping[str, Tensor]:
    """Return the heads' hinge loss with their R1 penalty as "total", and figures for the log.

    Args:
        heads: that learn.
        real: features of what is real, without gradient.
        fake: features of the student's, without gradient.
        condition: what all heads are told.
        r1_weight: of the penalty; 0 leaves it out.
    """
    if r1_weight > 0:
        on_real, penalty = r1_penalty(heads, real, condition)
    else:
        on_real, penalty = heads(real, condition), torch.zeros((), device=real[0].device)
    on_fake = heads(fake, condition)
    total = hinge_of_heads(on_real, on_fake) + r1_weight * penalty
    return {"total": total, "accuracy": share_told_apart(on_real, on_fake), "r1": penalty}


def hinge_of_student(fake: Logits) -> Tensor:
    """Return what the student minimises: minus the sum over the heads of the mean logit."""
    return -torch.stack([logits.mean() for logits in fake]).sum()


def share_told_apart(real: Logits, fake: Logits) -> Tensor:
    """Return the share of real and fake that the mean of all heads puts on the right side."""
    on_real, on_fake = (
        torch.stack([one.mean(dim=1) for one in logits]).mean(dim=0) for logits in (real, fake)
    )
    return ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2


def r1_penalty(
    heads: Heads, features: Features, condition: Tensor | None = None
) -> tuple[Logits, Tensor]:
    """Return the logits of real features, and the R1 penalty of the heads at them.

    That is the sum over the heads of E |d D_k / d F_k|^2 (arXiv 1801.04406), where D_k is the sum
    of a head's logits of an item, and F_k its features: the frozen network before them is left out,
    as in arXiv 2311.17042. Of the mean logit the penalty would be smaller by the square of the
    number of places, and the paper's weight of 1e-5 without any effect.
    """
    inputs = [level.detach().float().requires_grad_(True) for level in features]
    logits = heads(inputs, condition)
    total = torch.stack([one.sum() for one in logits]).sum()
    gradients = torch.autograd.grad(total, inputs, create_graph=True)
    squares = [gradient.square().flatten(1).sum(dim=1).mean() for gradient in gradients]
    return logits, torch.stack(squares).sum()
