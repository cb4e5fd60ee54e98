"""Multistep solvers: the teacher's flow in fewer evaluations, without any training.

`flow.solve` takes every prediction for constant over a step. These two remember the prediction of
the step before and extrapolate x0 along a straight line in lambda = log(alpha / sigma), at no
further evaluation: DPM-Solver++ 2M (algorithm 2 of arXiv 2211.01095), and UniPC of order 2
(arXiv 2302.04867), which beside that corrects every point with the prediction that was made there.
Both are samplers like those in `samplers`, but for teachers: a few-step student was trained to go
straight from time to time, and remembers nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Real
from torch import Tensor

from twostep.diffusion.flow import Denoise, Keep, OnStep, step, walk
from twostep.diffusion.prediction import Prediction
from twostep.diffusion.schedule import Schedule
from twostep.diffusion.shapes import Batch, as_column


def dpmpp_2m(
    denoise: Denoise,
    x: Batch,
    times: Real[Tensor, "points batch"],
    schedule: Schedule,
    draw_noise: Callable[[int], Tensor],
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Batch:
    """Follow the flow with DPM-Solver++ 2M (algorithm 2 of arXiv 2211.01095).

    The first step and one that lands on 0 are those of `flow.step`. Arguments and errors are those
    of `flow.solve`; no noise is drawn.
    """
    path = _Path.of(times, schedule)
    predictions: list[Tensor] = []

    def move(i: int, prediction: Prediction, s: Tensor) -> Tensor:
        predictions.append(prediction.x0)
        x_s = step(prediction, s, schedule)
        return x_s + path.extrapolation(i, predictions)

    return walk(denoise, x, times, schedule, move=move, on_step=on_step, keep=keep)


def unipc(
    denoise: Denoise,
    x: Batch,
    times: Real[Tensor, "points batch"],
    schedule: Schedule,
    draw_noise: Callable[[int], Tensor],
    *,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Batch:
    """Follow the flow with UniPC of order 2, in the form B(h) = exp(h) - 1 (arXiv 2302.04867).

    Once the prediction at a point is there, the step that led to it is taken again with it, and the
    next one starts from the result. Arguments and errors are those of `flow.solve`; no noise is
    drawn.
    """
    path = _Path.of(times, schedule)
    predictions: list[Tensor] = []
    starts: list[Tensor] = []

    def move(i: int, prediction: Prediction, s: Tensor) -> Tensor:
        predictions.append(prediction.x0)
        # Where the prediction was asked: what a prediction is made of.
        x_t = step(prediction, times[i], schedule)
        if i > 0:
            x_t = path.corrected(i - 1, starts[i - 1], predictions, x_t)
        starts.append(x_t)
        x_s = path.exponential_step(i, x_t, prediction.x0)
        return x_s + path.extrapolation(i, predictions)

    return walk(denoise, x, times, schedule, move=move, on_step=on_step, keep=keep)


@dataclass(frozen=True, eq=False)
class _Path:
    """The coefficients of every point of a walk, in float64: differences of lambda cancel.

    Args:
        alphas: of every point and item.
        sigmas: of every point and item.
        lengths: h, by how much lambda grows over every step; infinite where it ends at 0.
    """

    alphas: Float64[Tensor, "points batch"]
    sigmas: Float64[Tensor, "points batch"]
    lengths: Float64[Tensor, "steps batch"]

    @classmethod
    def of(cls, times: Tensor, schedule: Schedule) -> _Path:
        """Look the coefficients of falling times [points, batch] up."""
        cpu = times.cpu()
        pairs = [schedule.coefficients(t, t.double()) for t in cpu]
        alphas = torch.stack([alpha for alpha, _ in pairs])
        sigmas = torch.stack([sigma for _, sigma in pairs])
        lambdas = alphas.log() - sigmas.log()
        lengths = torch.where(cpu[1:] == cpu[:-1], 0.0, lambdas[1:] - lambdas[:-1])
        return cls(alphas, sigmas, lengths)

    def exponential_step(self, i: int, x_t: Tensor, x0: Tensor) -> Tensor:
        """Return where step i leads if x0 stays as it is: equation 8 of arXiv 2211.01095.

        That is the step of `flow.step`, from an x_t that the prediction need not belong to.
        """
        scale = self.sigmas[i + 1] / self.sigmas[i]
        gain = -self.alphas[i + 1] * torch.expm1(-self.lengths[i])
        return _like(scale, x_t) * x_t + _like(gain, x_t) * x0

    def extrapolation(self, i: int, predictions: list[Tensor]) -> Tensor | float:
        """Return what the slope of x0 over the step before adds to step i; 0 without one."""
        if i == 0:
            return 0.0
        h, last = self.lengths[i], self.lengths[i - 1]
        # The last step has no end in lambda, and an item that has waited has no slope.
        has_slope = h.isfinite() & (last > 0)
        ratio = torch.where(has_slope, h / last, 0.0)
        gain = -0.5 * self.alphas[i + 1] * torch.expm1(-h) * ratio
        return _like(gain, predictions[i]) * (predictions[i] - predictions[i - 1])

    def corrected(self, i: int, x_t: Tensor, predictions: list[Tensor], x_s: Tensor) -> Tensor:
        """Take step i again with the prediction where it ended: UniC, equation 9 of the paper.

        Args:
            i: the step, which has been taken.
            x_t: where it started.
            predictions: x0 of all points up to the one where it ended.
            x_s: where it ended; an item that has not moved stays there.
        """
        h = self.lengths[i]
        negative = -h
        base = torch.expm1(negative)
        ahead = torch.full_like(h, 0.5)
        behind = torch.zeros_like(h)
        if i > 0:
            last = self.lengths[i - 1]
            # The two integrals of the exponential against 1 and lambda, which the weights of both
            # slopes have to reproduce (equation 10 of the paper, solved by hand).
            first = (base / negative - 1) / base
            second = 2 * ((base / negative - 1) / negative - 0.5) / base
            position = -last / h
            behind_weight = (first - second) / (1 - position)
            has_slope = last > 0
            ahead = torch.where(has_slope, first - behind_weight, ahead)
            behind = torch.where(has_slope, behind_weight / position, behind)
        now, before = predictions[i + 1], predictions[i]
        change = _like(ahead, x_t) * (now - before)
        if i > 0:
            change = change + _like(behind, x_t) * (predictions[i - 1] - before)
        gain = _like(-self.alphas[i + 1] * base, x_t)
        corrected = self.exponential_step(i, x_t, before) + gain * change
        return torch.where(as_column(h > 0, x_t), corrected, x_s)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Return one value per item, shaped [batch, 1, ...], in the dtype and on the device of x."""
    # dtype before device: some accelerators have no float64.
    return as_column(values.to(x.dtype), x)
