"""Distribution matching: pulling a student's pictures from its own distribution to the teacher's.

DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867). Noised to a time t, the student's pictures have
one density and the teacher's have another. The gradient of the Kullback-Leibler divergence between
both, at a picture, is the difference of their scores. The teacher's score is known: it is the
teacher. The student's own is estimated by one more network, the *fake score*, which starts as the
teacher and is trained to denoise what the student makes at the moment.

A score follows from a prediction, score = -eps / sigma_t, and the difference of two scores at one
x_t from the difference of the x0 that they see: alpha_t / sigma_t^2 times it. So both losses need
nothing but denoisers, and know neither the method nor how the student made its pictures. The
weighting and the normalisation are those of DMD2's published code for SDXL, in which the loss is
written as a squared distance to a target that has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twostep.diffusion import Prediction, Schedule
from twostep.diffusion.shapes import Batch, Times
from twostep.distill.times import draw_uniform_times
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

Predict = Callable[[Tensor, Tensor, Conditioning], Prediction]
"""(x_t, t, conditioning) -> Prediction; every `Denoiser` is one."""

LOWEST_SHARE = 0.02
HIGHEST_SHARE = 0.98
"""Where the times of the matching lie: U{0.02 T, ..., 0.98 T} in DMD2's code."""

_LEAST_NORM = 1e-6
"""Below it a picture lies where the teacher sees it already, and has no direction to go."""


def draw_matching_times(count: int, generator: torch.Generator, schedule: Schedule) -> Times:
    """Draw the times at which distributions are compared, one per item, uniform over 2 to 98 %."""
    return draw_uniform_times(
        count, generator, schedule, lowest_share=LOWEST_SHARE, highest_share=HIGHEST_SHARE
    )


def distribution_matching_loss(
    x: Batch,
    conditioning: Conditioning,
    t: Times,
    eps: Batch,
    *,
    teacher: Denoiser,
    fake: Predict,
    guidance: float = 1.0,
    empty: Conditioning | None = None,
) -> Tensor:
    """Return a scalar whose gradient moves x towards the teacher's distribution.

    The gradient at one item is g = (x0_fake - x0_real) / mean|x - x0_real|, where both networks are
    asked about the same x noised to t, and the mean runs over the item's own values: the gradient
    of arXiv 2311.18828 with its normalisation, and as in DMD2's code with no other weight of t. The
    loss is 0.5 mean((x - stop(x - g))^2) over all values, so its gradient in x is g divided by the
    number of values.

    Args:
        x: clean latents of the student, with gradient.
        conditioning: what they are to show.
        t: times to which they are noised, one per item on the CPU (`draw_matching_times`).
        eps: the noise, in the shape of x.
        teacher: the real score; it is asked without gradient.
        fake: the fake score, without guidance and without gradient.
        guidance: the teacher's scale of classifier-free guidance; 1 is none, DMD2 has 8 for SDXL.
        empty: the conditioning of the empty prompt for the same items; needed with guidance.

    Returns:
        The loss in float32, 0 where x lies exactly where the teacher sees it.

    Raises:
        ValueError: there is guidance but no empty conditioning.
    """
    g = matching_direction(
        x.detach(),
        conditioning,
        t,
        eps,
        teacher=teacher,
        fake=fake,
        guidance=guidance,
        empty=empty,
    )
    x = x.float()
    return 0.5 * (x - (x - g).detach()).square().mean()


@torch.no_grad()
def matching_direction(
    x: Batch,
    conditioning: Conditioning,
    t: Times,
    eps: Batch,
    *,
    teacher: Denoiser,
    fake: Predict,
    guidance: float = 1.0,
    empty: Conditioning | None = None,
) -> Batch:
    """Return g of `distribution_matching_loss` in float32: x - g is where x is pulled to.

    Arguments and errors are the same; x needs no gradient.
    """
    if guidance != 1 and empty is None:
        raise ValueError("guidance of the teacher needs the conditioning of the empty prompt")
    negative = conditioning if empty is None else empty
    x = x.float()
    x_t = teacher.schedule.add_noise(x, eps.float(), t)
    real = teacher.with_guidance(conditioning, negative, guidance)(x_t, t).x0
    imagined = fake(x_t, t, conditioning).x0
    size = (x - real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.where(size > _LEAST_NORM, (imagined - real) / size.clamp(min=_LEAST_NORM), 0.0)


def fake_score_loss(
    x: Batch,
    conditioning: Conditioning,
    t: Times,
    eps: Batch,
    *,
    fake: Predict,
    schedule: Schedule,
) -> Tensor:
    """Return the denoising loss of the fake score on what the student made: mean (eps_hat - eps)^2.

    This is the ordinary training of a diffusion model (equation 14 of arXiv 2006.11239), on the
    student's pictures instead of data; its minimum is the score of the student's distribution.

    Args:
        x: clean latents of the student; no gradient reaches them.
        conditioning: what they are to show.
        t: times to which they are noised, one per item; DMD2 draws all times alike
            (`times.draw_uniform_times`).
        eps: the noise, in the shape of x.
        fake: the fake score, with gradient.
        schedule: whose times they are.
    """
    x_t = schedule.add_noise(x.detach().float(), eps.float(), t)
    return (fake(x_t, t, conditioning).eps.float() - eps.float()).square().mean()
