"""The loss of rectified flow (arXiv 2209.03003): a straight path from data to noise is learned by
its velocity, eps - x0, at times that lie mostly in the middle (arXiv 2403.03206, section 3.1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.diffusion.shapes import Batch, Times
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser


def draw_logit_normal_times(
    count: int, generator: torch.Generator, *, mean: float = 0.0, deviation: float = 1.0
) -> Float[Tensor, " count"]:
    """Return times in 0..1 whose logits are normal (eq 19 of arXiv 2403.03206).

    Args:
        count: number of times.
        generator: of the random numbers.
        mean: of the logits; above 0 there is more noise.
        deviation: of the logits.
    """
    return (mean + deviation * torch.randn(count, generator=generator)).sigmoid()


def flow_loss(
    denoiser: Denoiser, x0: Batch, conditioning: Conditioning, t: Times, eps: Batch
) -> Float[Tensor, ""]:
    """Return the mean squared error of the predicted velocity.

    Args:
        denoiser: predicts, on a rectified flow.
        x0: clean latents.
        conditioning: of the same items.
        t: times above 0, up to 1, on the CPU.
        eps: noise of unit variance.
    """
    predicted = denoiser(denoiser.schedule.add_noise(x0, eps, t), t, conditioning)
    velocity = predicted.eps - predicted.x0
    loss: Tensor = (velocity - (eps - x0)).square().mean()
    return loss
