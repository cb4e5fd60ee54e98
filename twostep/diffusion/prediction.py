"""What a denoiser predicts, free of the prediction type of its network.

A network may predict eps, x0, v = alpha eps - sigma x0 (arXiv 2202.00512), for rectified flow
u = eps - x0 (arXiv 2209.03003), or F of EDM (arXiv 2206.00364), which is -v. With x_t = alpha x0 +
sigma eps each of them gives the other ones. After `prediction_from_output` nobody needs to know the
type. Coefficients come from a schedule; this file knows no times.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from twostep.diffusion.shapes import Batch, Coefficients, Values
from twostep.errors import TwostepError

PredictionType = Literal["eps", "x0", "v", "flow", "edm"]
"""What the output of a network means."""


class PredictionTypeError(TwostepError):
    """A prediction type that is not known."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The clean sample and the noise that a denoiser sees in x_t: two coordinates of one answer."""

    x0: Batch
    eps: Batch

    def v(self, alpha: Coefficients, sigma: Coefficients) -> Values:
        """Return the same answer as v = alpha eps - sigma x0."""
        return to_v(self.x0, self.eps, alpha, sigma)

    def flow(self) -> Values:
        """Return the same answer as u = eps - x0."""
        return self.eps - self.x0


def eps_to_x0(eps: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return x0 = (x_t - sigma eps) / alpha, eq 3 of arXiv 2402.13929; alpha must not be 0."""
    return (x_t - sigma * eps) / alpha


def x0_to_eps(x0: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return eps = (x_t - alpha x0) / sigma, eq 4 of arXiv 2402.13929; sigma must not be 0."""
    return (x_t - alpha * x0) / sigma


def v_to_x0(v: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return x0 = alpha x_t - sigma v, appendix D of arXiv 2202.00512.

    The schedule must preserve variance.
    """
    return alpha * x_t - sigma * v


def v_to_eps(v: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return eps = sigma x_t + alpha v, appendix D of arXiv 2202.00512.

    The schedule must preserve variance.
    """
    return sigma * x_t + alpha * v


def to_v(x0: Values, eps: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return v = alpha eps - sigma x0, appendix D of arXiv 2202.00512."""
    return alpha * eps - sigma * x0


def flow_to_x0(flow: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return x0 = (x_t - sigma u) / (alpha + sigma) of u = eps - x0, in any schedule."""
    return (x_t - sigma * flow) / (alpha + sigma)


def flow_to_eps(flow: Values, x_t: Values, alpha: Coefficients, sigma: Coefficients) -> Values:
    """Return eps = (x_t + alpha u) / (alpha + sigma) of u = eps - x0, at any time."""
    return (x_t + alpha * flow) / (alpha + sigma)


def prediction_from_output(
    output: Values,
    x_t: Values,
    alpha: Coefficients,
    sigma: Coefficients,
    prediction_type: PredictionType,
) -> Prediction:
    """Turn the raw output of a network at x_t into a Prediction.

    At the top of a variance-preserving schedule the same formulas hold although x_T is pure noise:
    alpha and sigma stay those of the schedule (section 3.5 of arXiv 2402.13929).

    Args:
        output: what the network returned.
        x_t: what it was given.
        alpha: the signal coefficient of each item at its time.
        sigma: the noise coefficient of each item at its time.
        prediction_type: what the output means. With `v` and `edm` the schedule must preserve
            variance, with `eps` alpha must not be 0.

    Raises:
        PredictionTypeError: the type is not known.
    """
    if prediction_type == "eps":
        return Prediction(x0=eps_to_x0(output, x_t, alpha, sigma), eps=output)
    if prediction_type == "x0":
        return Prediction(x0=output, eps=x0_to_eps(output, x_t, alpha, sigma))
    if prediction_type == "v":
        return Prediction(
            x0=v_to_x0(output, x_t, alpha, sigma),
            eps=v_to_eps(output, x_t, alpha, sigma),
        )
    if prediction_type == "edm":
        return Prediction(
            x0=v_to_x0(-output, x_t, alpha, sigma),
            eps=v_to_eps(-output, x_t, alpha, sigma),
        )
    if prediction_type == "flow":
        return Prediction(
            x0=flow_to_x0(output, x_t, alpha, sigma),
            eps=flow_to_eps(output, x_t, alpha, sigma),
        )
    *known, last = get_args(PredictionType)
    raise PredictionTypeError(
        f"prediction type {prediction_type!r} is not known; expected {', '.join(known)} or {last}. "
        "In the words of diffusers these are epsilon, sample, v_prediction, flow_prediction, and "
        "epsilon of an EDM scheduler."
    )


def guide(positive: Prediction, negative: Prediction, scale: float | Coefficients) -> Prediction:
    """Apply classifier-free guidance: eps_n + scale (eps_p - eps_n), eq 6 of arXiv 2207.12598.

    x0 and u are linear in eps, so the same line holds for them.

    Args:
        positive: the prediction for the prompt.
        negative: the prediction for the negative, often empty, prompt.
        scale: 1 is no guidance, 0 is the negative prediction; one for all, or one per item, shaped
            [batch, 1, ...].
    """
    return Prediction(
        x0=negative.x0 + scale * (positive.x0 - negative.x0),
        eps=negative.eps + scale * (positive.eps - negative.eps),
    )
