"""What a network predicts, found by asking it: configs of merges and single files are often wrong
about it.

A known latent is noised, denoised as if the network predicted eps, v or x0, and compared. Nothing
is trained here.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch

from twostep.diffusion import PredictionType, prediction_from_output
from twostep.diffusion.shapes import Latents
from twostep.formats.locate import ModelError
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

TIMES = (200, 400, 600)


@dataclass(frozen=True)
class Probe:
    """What a network was found to predict: errors of x0 by type, relative to the latents' own mean
    square.

    `sureness` is how many times larger the error of the next best type is. It is sure where the
    network knows the latents in one way, by half of the error of answering zero, and only in one,
    by half of the next best error.
    """

    found: PredictionType
    sureness: float
    is_sure: bool
    errors: dict[PredictionType, float]


@torch.no_grad()
def probe_prediction_type(denoiser: Denoiser, x0: Latents, conditioning: Conditioning) -> Probe:
    """Denoise known latents as if the network predicted each type; four latents are enough."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    raw = replace(denoiser, prediction_type="eps")
    errors: dict[PredictionType, float] = dict.fromkeys(get_args(PredictionType), 0.0)
    for time in TIMES:
        t = torch.full((len(x0),), time)
        x_t = denoiser.schedule.add_noise(x0, eps, t)
        alpha, sigma = denoiser.schedule.coefficients(t, x_t)
        # taken for eps, an answer stays as the network gave it
        output = raw(x_t, t, conditioning).eps
        for kind in errors:
            seen = prediction_from_output(output, x_t, alpha, sigma, kind).x0
            errors[kind] += (
                (seen - x0).square().mean().item() / len(TIMES) / x0.square().mean().item()
            )
    (found, least), (_, second), *_ = sorted(errors.items(), key=lambda entry: entry[1])
    sureness = second / max(least, 1e-12)
    return Probe(found, sureness, least <= 0.5 and sureness >= 2, errors)


def check_prediction_type(denoiser: Denoiser, x0: Latents, conditioning: Conditioning) -> Probe:
    """Probe a teacher; ModelError where the network surely predicts something else than its config
    says.
    """
    probe = probe_prediction_type(denoiser, x0, conditioning)
    if probe.found != denoiser.prediction_type and probe.is_sure:
        listed = ", ".join(f"{kind} {error:.3g}" for kind, error in probe.errors.items())
        raise ModelError(
            f"The teacher's config says that it predicts {denoiser.prediction_type}, but it predicts {probe.found} "
            f"({probe.sureness:.1f} times nearer than the next; errors of x0: {listed}). Put "
            f'prediction_type = "{probe.found}" into the recipe, or correct its scheduler_config.json.'
        )
    return probe
