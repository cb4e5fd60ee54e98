"""A denoiser's answer, freed of its prediction type.

A network may predict eps, x0, or v = alpha eps - sigma x0 (arXiv 2202.00512). With x_t = alpha x0 +
sigma eps and alpha^2 + sigma^2 = 1 each of them gives the other two (eq 3 and 4 of arXiv
2402.13929). After `prediction_from_output` nobody asks again. Coefficients come from
`VariancePreserving.coefficients`; this file knows no times.
"""

from dataclasses import dataclass
from typing import Literal

from twostep.diffusion.shapes import Batch, Coefficients, Values
from twostep.errors import TwostepError

PredictionType = Literal["eps", "x0", "v"]
"""What a network's output means."""


class PredictionTypeError(TwostepError):
    """A prediction type that is none of eps, x0 and v."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Where the denoiser sees the clean sample, and where the noise: two coordinates of one answer."""

    x0: Batch
    eps: Batch

    def v(self, alpha: Coefficients, sigma: Coefficients) -> Values:
        """Return the same answer as v = alpha eps - sigma x0, for alpha and sigma that broadcast
        against it.
        """
        return to_v(self.x0, self.eps, alpha, sigma)


def eps_to_x0(eps: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return x0 = (x_t - sigma eps) / alpha, eq 3 of arXiv 2402.13929."""
    return (x_t - sigma * eps) / alpha


def x0_to_eps(x0: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return eps = (x_t - alpha x0) / sigma, eq 4 of arXiv 2402.13929; sigma must not be 0, so not
    at t = 0.
    """
    return (x_t - alpha * x0) / sigma


def v_to_x0(v: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return x0 = alpha x_t - sigma v, appendix D of arXiv 2202.00512."""
    return alpha * x_t - sigma * v


def v_to_eps(v: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return eps = sigma x_t + alpha v, appendix D of arXiv 2202.00512."""
    return sigma * x_t + alpha * v


def to_v(x0: Values, eps: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return v = alpha eps - sigma x0, appendix D of arXiv 2202.00512."""
    return alpha * eps - sigma * x0


def prediction_from_output(
    output: Values,
    x_t: Values,
    alpha: Coefficients,
    sigma: Coefficients,
    prediction_type: PredictionType,
) -> Prediction:
    """Read a network's raw output at x_t as a Prediction.

    At t = T the same formulas hold although x_T is pure noise: alpha and sigma stay those of the
    schedule (section 3.5 of arXiv 2402.13929). Raises PredictionTypeError for a type other than
    eps, x0 and v.
    """
    if prediction_type == "eps":
        return Prediction(x0=eps_to_x0(output, x_t, alpha, sigma), eps=output)
    if prediction_type == "x0":
        return Prediction(x0=output, eps=x0_to_eps(output, x_t, alpha, sigma))
    if prediction_type == "v":
        return Prediction(
            x0=v_to_x0(output, x_t, alpha, sigma), eps=v_to_eps(output, x_t, alpha, sigma)
        )
    raise PredictionTypeError(
        f"prediction type {prediction_type!r} is not known; expected eps, x0 or v. "
        "In diffusers' words these are epsilon, sample and v_prediction."
    )


def guide(conditional: Prediction, unconditional: Prediction, scale: float) -> Prediction:
    """Push the answer away from the unconditional one: eps_u + scale (eps_c - eps_u), eq 6 of arXiv
    2207.12598.

    x0 is linear in eps, so the same line holds for it. A scale of 1 is no guidance.
    """
    return Prediction(
        x0=unconditional.x0 + scale * (conditional.x0 - unconditional.x0),
        eps=unconditional.eps + scale * (conditional.eps - unconditional.eps),
    )
