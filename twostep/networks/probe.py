"""What a network predicts, measured: configs of merges and single files are often wrong about it.

A known latent is noised and denoised as if the network predicted eps, v or x0; the type whose x0
is nearest to the latent is the network's own.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch

from twostep.diffusion import PredictionType, prediction_from_output
from twostep.diffusion.shapes import Batch
from twostep.formats.locate import ModelError
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

SHARES = (0.2, 0.4, 0.6)
"""The shares of the way from clean data to noise at which a network is probed."""


@dataclass(frozen=True)
class Probe:
    """What a network was measured to predict.

    Args:
        prediction_type: The type with the smallest error.
        sureness: How many times larger the error of the next best type is.
        is_sure: Whether the smallest error is at most half of that of answering zero, and at most
            half of the next best error. A network that knows nothing of the latents is not judged.
        errors: Mean squared errors of x0 by type, relative to the latents' mean square.
    """

    prediction_type: PredictionType
    sureness: float
    is_sure: bool
    errors: dict[PredictionType, float]


@torch.no_grad()
def probe_prediction_type(denoiser: Denoiser, x0: Batch, conditioning: Conditioning) -> Probe:
    """Denoise known latents as if the network predicted each type; four latents are enough."""
    schedule = denoiser.schedule
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    # Taken for eps, an output stays as the network gave it.
    raw = replace(denoiser, prediction_type="eps")
    power = x0.square().mean().item()
    errors: dict[PredictionType, float] = dict.fromkeys(get_args(PredictionType), 0.0)
    for share in SHARES:
        t = torch.full((len(x0),), schedule.time_at(share))
        x_t = schedule.add_noise(x0, eps, t)
        alpha, sigma = schedule.coefficients(t, x_t)
        output = raw(x_t, t, conditioning).eps
        for kind in errors:
            predicted = prediction_from_output(output, x_t, alpha, sigma, kind).x0
            errors[kind] += (predicted - x0).square().mean().item() / len(SHARES) / power
    (best, least), (_, second), *_ = sorted(errors.items(), key=lambda entry: entry[1])
    sureness = second / max(least, 1e-12)
    return Probe(best, sureness, least <= 0.5 and sureness >= 2, errors)


def check_prediction_type(denoiser: Denoiser, x0: Batch, conditioning: Conditioning) -> Probe:
    """Probe a teacher.

    Raises:
        ModelError: The network surely predicts something else than its config says.
    """
    probe = probe_prediction_type(denoiser, x0, conditioning)
    if probe.prediction_type != denoiser.prediction_type and probe.is_sure:
        errors = ", ".join(f"{kind} {error:.3g}" for kind, error in probe.errors.items())
        raise ModelError(
            f"The teacher's config says that it predicts {denoiser.prediction_type}, but it "
            f"predicts {probe.prediction_type} ({probe.sureness:.1f} times nearer than the next; "
            f'errors of x0: {errors}). Put prediction_type = "{probe.prediction_type}" into the '
            "recipe, or correct its scheduler_config.json."
        )
    return probe
