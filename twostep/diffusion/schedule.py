"""How much signal and how much noise each time holds: x_t = alpha_t x0 + sigma_t eps.

Times run from 0 (clean data) to `top` (pure noise). `VariancePreserving` counts integer times, as
DDPM and SDXL do; `RectifiedFlow`, as of SD3 and Flux, and `Edm`, as of CosXL and Playground 2.5,
have real times in 0..1. A schedule also says which number a network is fed for a time. Grids of
times and networks are unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import Batch, Time, Times, sent
from twostep.errors import TwostepError

_ALMOST_ZERO = 2.0**-12
"""alpha at the top of a schedule without signal there."""


class ScheduleError(TwostepError):
    """Values that make no schedule, or a time that lies outside of one."""


@runtime_checkable
class Schedule(Protocol):
    """What samplers, grids and training ask of a schedule."""

    @property
    def top(self) -> Time:
        """The time of pure noise; an int if all times are integers."""

    @property
    def lowest(self) -> Time:
        """The lowest time above 0 that a network is asked about."""

    def coefficients(
        self, t: Times, like: Batch
    ) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
        """Return (alpha_t, sigma_t) of each item, shaped [batch, 1, ...].

        They have the dtype and the device of `like`. Raises ScheduleError for a time outside of
        0..top.
        """

    def network_time(self, t: Times) -> Times:
        """Return the number that a network is fed for each time, on the device of `t`."""

    def add_noise(self, x0: Batch, eps: Batch, t: Times) -> Batch:
        """Return x_t = alpha_t x0 + sigma_t eps, and exactly eps where t is the top."""

    def time_at(self, share: Fraction | float) -> Time:
        """Return the time at a share of the way from clean (0) to pure noise (1).

        A grid of N steps has its times at the shares 1/N, 2/N, ..., 1.
        """

    def share_at(self, t: Time) -> float:
        """Return the share of the way at which a time lies: the inverse of `time_at`."""


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """A schedule with alpha_t^2 + sigma_t^2 = 1 at integer times (eq 1 of arXiv 2402.13929).

    alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), with abar_t the running product of
    1 - beta. A network trained in the usual way is fed t - 1.

    Attributes:
        alphas: alpha_t for t in 0..T, in float64 on the CPU; alphas[0] is 1.
        sigmas: sigma_t for t in 0..T, in float64 on the CPU; sigmas[0] is 0.
    """

    alphas: Float64[Tensor, " times_plus_one"]
    sigmas: Float64[Tensor, " times_plus_one"]

    @classmethod
    def from_betas(cls, betas: Float[Tensor, " times"]) -> VariancePreserving:
        """Build the schedule of these betas; ScheduleError if one lies outside of (0, 1)."""
        if betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            span = ""
            if betas.numel():
                span = f" from {betas.min().item():g} to {betas.max().item():g}"
            raise ScheduleError(
                "betas must be one or more numbers between 0 and 1, both excluded; "
                f"got {betas.numel()} of them{span}. "
                "Use VariancePreserving.scaled_linear() for the schedule of SDXL."
            )
        abar = torch.cumprod(1.0 - betas.detach().to("cpu", torch.float64), dim=0)
        abar = torch.cat([abar.new_ones(1), abar])
        return cls(alphas=abar.sqrt(), sigmas=(1.0 - abar).sqrt())

    @classmethod
    def scaled_linear(
        cls, num_times: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> VariancePreserving:
        """Build the schedule whose betas are linear in their square root; defaults are SDXL's."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_times, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def linear(
        cls, num_times: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02
    ) -> VariancePreserving:
        """Build the schedule of linear betas; defaults are those of DDPM (arXiv 2006.11239)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_times, dtype=torch.float64))

    @classmethod
    def cosine(cls, num_times: int = 1000) -> VariancePreserving:
        """Build the schedule whose abar is a squared cosine (eq 17 of arXiv 2102.09672)."""
        shares = torch.linspace(0, 1, num_times + 1, dtype=torch.float64)
        abar = ((shares + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return cls.from_betas((1 - abar[1:] / abar[:-1]).clamp(max=0.999))

    def with_zero_snr(self) -> VariancePreserving:
        """Return the schedule rescaled so that no signal is left at T.

        sqrt(abar_t) is shifted and scaled so that its last value is 0 and its first stays
        (algorithm 1 of arXiv 2305.08891). In the place of 0 stands 2^-12, as in diffusers, so that
        sigma / alpha is finite, which other programs count in.
        """
        roots = self.alphas[1:]
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        alphas = torch.cat([self.alphas[:1], roots.clamp(min=_ALMOST_ZERO)])
        return VariancePreserving(alphas=alphas, sigmas=(1 - alphas**2).sqrt())

    @property
    def top(self) -> int:
        """T, the time at which the network is fed pure noise."""
        return len(self.alphas) - 1

    @property
    def num_times(self) -> int:
        """The number of times above 0, which is T."""
        return self.top

    @property
    def lowest(self) -> int:
        """The lowest time above 0."""
        return 1

    def coefficients(
        self, t: Times, like: Batch
    ) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
        """Look up (alpha_t, sigma_t) of each item, shaped [batch, 1, ...], like `like` in dtype.

        The table lives on the CPU: times kept there cost no synchronisation with an accelerator.

        Raises:
            ScheduleError: a time lies outside 0..T.
        """
        index = t.to(self.alphas.device, torch.int64)
        if index.numel():
            lowest, highest = map(int, index.aminmax())
            if not 0 <= lowest <= highest <= self.top:
                raise ScheduleError(
                    f"times must lie in 0..{self.top}; got {lowest}..{highest}. Here 0 is clean "
                    "and the top is pure noise: a scheduler's index counts one less."
                )
        return _like(self.alphas[index], like), _like(self.sigmas[index], like)

    def network_time(self, t: Times) -> Times:
        """Return t - 1, the index that networks know, and 0 for clean data."""
        return (t - 1).clamp(min=0)

    def add_noise(self, x0: Batch, eps: Batch, t: Times) -> Batch:
        """Return x_t = alpha_t x0 + sigma_t eps, but exactly eps where t = T.

        These are eq 1 and eq 24 of arXiv 2402.13929: alpha_T is not 0, and what is left of the
        picture at T would be seen by a network in training but not in sampling.
        """
        alpha, sigma = self.coefficients(t, x0)
        is_top = sent(t == self.top, x0.device).view(alpha.shape)
        return torch.where(is_top, eps, alpha * x0 + sigma * eps)

    def time_at(self, share: Fraction | float) -> int:
        """Return T times a share of the way, rounded half to even."""
        return round(self.top * share)

    def share_at(self, t: Time) -> float:
        """Return t / T."""
        return t / self.top


@dataclass(frozen=True)
class RectifiedFlow:
    """A schedule of straight paths: alpha_t = 1 - t, sigma_t = t (arXiv 2209.03003).

    Times are real numbers in 0..1; a network is fed 1000 t. Grids are shifted towards noise for
    higher resolutions: the share u of the way lies at t = shift u / (1 + (shift - 1) u) (eq 23 of
    arXiv 2403.03206).

    Attributes:
        shift: how far grids are shifted; 1 leaves them uniform, SD3 has 3.
    """

    shift: float = 1.0

    NETWORK_SCALE = 1000
    """The number that a network is fed for pure noise."""

    def __post_init__(self) -> None:
        """Refuse a shift that is not a positive number."""
        if not 0 < self.shift < math.inf:
            raise ScheduleError(
                f"shift must be a finite number above 0; got {self.shift}. "
                "Use 1 for a uniform grid, 3 for that of SD3."
            )

    @property
    def top(self) -> float:
        """The time of pure noise."""
        return 1.0

    @property
    def lowest(self) -> float:
        """A time that is nearly clean, at which eps still follows from x0."""
        return 1 / self.NETWORK_SCALE

    def coefficients(
        self, t: Times, like: Batch
    ) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
        """Return (1 - t, t) of each item, shaped [batch, 1, ...], like `like` in dtype.

        They are computed where `t` lives; times on the CPU cost no synchronisation.

        Raises:
            ScheduleError: a time lies outside 0..1.
        """
        times = t.to("cpu", torch.float64)
        if times.numel() and not 0 <= float(times.min()) <= float(times.max()) <= 1:
            raise ScheduleError(
                f"times must lie in 0..1; got {float(times.min()):g}..{float(times.max()):g}. "
                "Here 0 is clean and 1 is pure noise; a network's time is 1000 times as large."
            )
        return _like(1 - times, like), _like(times, like)

    def network_time(self, t: Times) -> Times:
        """Return 1000 t."""
        return t * self.NETWORK_SCALE

    def add_noise(self, x0: Batch, eps: Batch, t: Times) -> Batch:
        """Return x_t = (1 - t) x0 + t eps, which is exactly eps at t = 1."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0 + sigma * eps

    def time_at(self, share: Fraction | float) -> float:
        """Return the shifted time at a share of the way."""
        uniform = float(share)
        return self.shift * uniform / (1 + (self.shift - 1) * uniform)

    def share_at(self, t: Time) -> float:
        """Return the share of the way at which a shifted time lies."""
        return t / (self.shift - (self.shift - 1) * t)


@dataclass(frozen=True)
class Edm:
    """A schedule of noise levels s without end, in variance-preserving form (arXiv 2206.00364).

    EDM speaks of data of the deviation sigma_data plus s times noise, and scales what the network
    is given by 1 / sqrt(s^2 + sigma_data^2). In units of sigma_data that is x_t = alpha x0 +
    sigma eps with alpha = sigma_data / sqrt(s^2 + sigma_data^2) and sigma = s / sqrt(s^2 +
    sigma_data^2), so that what EDM calls F is -v (eq 7 there), and everything else stays as it is.
    A network is fed log(s) / 4.

    Times are real numbers in 0..1, between which s rises as in eq 5 ("karras"), or evenly in its
    logarithm ("exponential"). Time 0 is clean, without the least noise.

    Attributes:
        sigma_min: the level that times tend to at 0.
        sigma_max: the level at 1, which hides the data.
        sigma_data: the deviation of the data; a codec divides latents by it.
        ramp: "karras" or "exponential".
        rho: the exponent of eq 5.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    ramp: str = "karras"
    rho: float = 7.0

    def __post_init__(self) -> None:
        """Refuse levels that do not rise, and an unknown ramp."""
        rises = 0 < self.sigma_min < self.sigma_max < math.inf
        if not (rises and self.sigma_data > 0 and self.rho > 0):
            raise ScheduleError(
                f"EDM needs 0 < sigma_min < sigma_max, sigma_data and rho above 0; got {self}."
            )
        if self.ramp not in ("karras", "exponential"):
            raise ScheduleError(
                f"ramp {self.ramp!r} is not known; expected 'karras' or 'exponential'."
            )

    @property
    def top(self) -> float:
        """The time of pure noise."""
        return 1.0

    @property
    def lowest(self) -> float:
        """A time that is nearly clean."""
        return 1 / 1000

    def level(self, t: Times) -> Float64[Tensor, " batch"]:
        """Return EDM's own noise level s at times above 0, in float64 on the CPU."""
        times = t.to("cpu", torch.float64)
        if times.numel() and not 0 <= float(times.min()) <= float(times.max()) <= 1:
            raise ScheduleError(
                f"times must lie in 0..1; got {float(times.min()):g}..{float(times.max()):g}. "
                "Here 0 is clean and 1 is pure noise; EDM's own noise levels follow from these."
            )
        if self.ramp == "exponential":
            lowest, highest = math.log(self.sigma_min), math.log(self.sigma_max)
            return (lowest + times * (highest - lowest)).exp()
        lowest = self.sigma_min ** (1 / self.rho)
        highest = self.sigma_max ** (1 / self.rho)
        return torch.pow(lowest + times * (highest - lowest), self.rho)

    def coefficients(
        self, t: Times, like: Batch
    ) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
        """Return (alpha_t, sigma_t) of each item, shaped [batch, 1, ...], like `like` in dtype.

        Raises:
            ScheduleError: a time lies outside 0..1.
        """
        level = torch.where(t.cpu() == 0, 0.0, self.level(t))
        scale = (level**2 + self.sigma_data**2).sqrt()
        return _like(self.sigma_data / scale, like), _like(level / scale, like)

    def network_time(self, t: Times) -> Times:
        """Return log(s) / 4."""
        return (self.level(t).log() / 4).to(t.dtype).to(t.device)

    def add_noise(self, x0: Batch, eps: Batch, t: Times) -> Batch:
        """Return x_t = alpha_t x0 + sigma_t eps, but exactly eps at the top."""
        alpha, sigma = self.coefficients(t, x0)
        is_top = sent(t == self.top, x0.device).view(alpha.shape)
        return torch.where(is_top, eps, alpha * x0 + sigma * eps)

    def time_at(self, share: Fraction | float) -> float:
        """Return the share itself."""
        return float(share)

    def share_at(self, t: Time) -> float:
        """Return the time itself."""
        return float(t)


def noise_levels(schedule: Schedule, times: Sequence[Time]) -> list[float]:
    """Return sigma / alpha at every time, in float64: what other programs count noise in."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = schedule.coefficients(t, t)
    levels: list[float] = (sigma / alpha).tolist()
    return levels


def make_schedule(kind: str, **parameters: object) -> Schedule:
    """Make a schedule of the description in a contract; ScheduleError for an unknown kind.

    Args:
        kind: "variance_preserving", "rectified_flow" or "edm".
        parameters: `betas` ("scaled_linear", "linear" or "cosine"), `beta_start`, `beta_end`,
            `num_times`, `zero_snr` and `trained` (betas one by one) of the first, `shift` of the
            second, those of `Edm` of the third.
    """
    makers: dict[str, Callable[..., Schedule]] = {
        "variance_preserving": _make_variance_preserving,
        "rectified_flow": RectifiedFlow,
        "edm": Edm,
    }
    if kind not in makers:
        raise ScheduleError(f"schedule {kind!r} is not known; expected {' or '.join(makers)}.")
    return makers[kind](**parameters)


def _make_variance_preserving(
    betas: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_times: int = 1000,
    zero_snr: bool = False,
    trained: Sequence[float] = (),
) -> VariancePreserving:
    makers: dict[str, Callable[[], VariancePreserving]] = {
        "scaled_linear": lambda: VariancePreserving.scaled_linear(num_times, beta_start, beta_end),
        "linear": lambda: VariancePreserving.linear(num_times, beta_start, beta_end),
        "cosine": lambda: VariancePreserving.cosine(num_times),
    }
    if betas not in makers:
        raise ScheduleError(f"betas {betas!r} are not known; expected {' or '.join(makers)}.")
    if trained:
        schedule = VariancePreserving.from_betas(torch.tensor(trained, dtype=torch.float64))
    else:
        schedule = makers[betas]()
    return schedule.with_zero_snr() if zero_snr else schedule


def _like(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per item, shaped [batch, 1, ...], with the dtype and device of `like`."""
    shaped = values.view((-1,) + (1,) * (like.ndim - 1))
    # dtype before device: some accelerators have no float64.
    return sent(shaped.to(like.dtype), like.device)
