"""How much signal and how much noise each time holds: x_t = alpha_t x0 + sigma_t eps.

Times run from 0 (clean data) to `top` (pure noise). `VariancePreserving` counts integer times, as
DDPM and SDXL do; `RectifiedFlow` has real times in 0..1, as SD3 and Flux do. A schedule also says
which number a network is fed for a time. Grids of times and networks are unknown here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import Batch, Time, Times
from twostep.errors import TwostepError


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
        """Return (alpha_t, sigma_t) of each item, shaped [batch, 1, ...], dtype and device of `like`.

        Raises ScheduleError for a time outside 0..top.
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
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= self.top:
            raise ScheduleError(
                f"times must lie in 0..{self.top}; got {int(index.min())}..{int(index.max())}. "
                "Here 0 is clean and the top is pure noise: a scheduler's index counts one less."
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
        is_top = (t == self.top).to(x0.device).view(alpha.shape)
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


def make_schedule(kind: str, **parameters: object) -> Schedule:
    """Make a schedule of the description in a contract; ScheduleError for an unknown kind.

    Args:
        kind: "variance_preserving" or "rectified_flow".
        parameters: `betas` ("scaled_linear" or "linear"), `beta_start`, `beta_end` and `num_times`
            of the first, `shift` of the second.
    """
    makers: dict[str, Callable[..., Schedule]] = {
        "variance_preserving": _make_variance_preserving,
        "rectified_flow": RectifiedFlow,
    }
    if kind not in makers:
        raise ScheduleError(f"schedule {kind!r} is not known; expected {' or '.join(makers)}.")
    return makers[kind](**parameters)


def _make_variance_preserving(
    betas: str, beta_start: float, beta_end: float, num_times: int
) -> VariancePreserving:
    makers = {
        "scaled_linear": VariancePreserving.scaled_linear,
        "linear": VariancePreserving.linear,
    }
    if betas not in makers:
        raise ScheduleError(f"betas {betas!r} are not known; expected {' or '.join(makers)}.")
    return makers[betas](num_times, beta_start, beta_end)


def _like(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per item shaped [batch, 1, ...], in the dtype and on the device of `like`."""
    shaped = values.view((-1,) + (1,) * (like.ndim - 1))
    # dtype before device: some accelerators have no float64.
    return shaped.to(like.dtype).to(like.device)
