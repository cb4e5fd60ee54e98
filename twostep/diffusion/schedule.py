"""How much signal and how much noise each time holds: x_t = alpha_t x0 + sigma_t eps.

Variance preserving, alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t), with abar_t the running
product of 1 - beta (eq 1 of arXiv 2402.13929). Times count from 0 (clean) to T; a network trained
the usual way is fed t - 1. Knows nothing of grids or networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from twostep.diffusion.shapes import Batch, Times
from twostep.errors import TwostepError


class ScheduleError(TwostepError):
    """Betas that make no schedule, or a time that lies outside of it."""


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """alpha_t and sigma_t for every integer time t in 0..T, in float64 on the CPU; alphas[0] = 1,
    sigmas[0] = 0.
    """

    alphas: Float64[Tensor, " times_plus_one"]
    sigmas: Float64[Tensor, " times_plus_one"]

    @classmethod
    def from_betas(cls, betas: Float[Tensor, " times"]) -> VariancePreserving:
        """Build the schedule whose abar_t is the running product of 1 - beta; each beta must lie in
        (0, 1).
        """
        if betas.numel() == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ScheduleError(
                f"betas must be one or more numbers between 0 and 1, both excluded; got {betas.numel()} of them"
                f"{f' from {betas.min().item():g} to {betas.max().item():g}' if betas.numel() else ''}. "
                "Use VariancePreserving.scaled_linear() for the schedule of SDXL."
            )
        abar = torch.cumprod(1.0 - betas.detach().to("cpu", torch.float64), dim=0)
        abar = torch.cat([abar.new_ones(1), abar])
        return cls(alphas=abar.sqrt(), sigmas=(1.0 - abar).sqrt())

    @classmethod
    def scaled_linear(
        cls, num_times: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> VariancePreserving:
        """Build the schedule whose betas are linear in their square root; the defaults are SDXL's."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_times, dtype=torch.float64)
        return cls.from_betas(roots**2)

    @classmethod
    def linear(
        cls, num_times: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02
    ) -> VariancePreserving:
        """Build the schedule with linear betas; the defaults are those of DDPM (arXiv 2006.11239)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_times, dtype=torch.float64))

    @property
    def num_times(self) -> int:
        """T, the top time, where the network is fed pure noise."""
        return len(self.alphas) - 1

    def coefficients(
        self, t: Times, like: Batch
    ) -> tuple[Float[Tensor, "batch *ones"], Float[Tensor, "batch *ones"]]:
        """Look up (alpha_t, sigma_t) for each item, shaped [batch, 1, ...] in the dtype and device
        of `like`.

        Raises ScheduleError for a time outside 0..T. The table lives on the CPU: times kept there
        cost no synchronisation with an accelerator.
        """
        index = t.to(self.alphas.device, torch.int64)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= self.num_times:
            raise ScheduleError(
                f"times must lie in 0..{self.num_times}; got {int(index.min())}..{int(index.max())}. "
                "Here 0 is clean and the top is pure noise: a scheduler's index counts one less."
            )
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = self.alphas[index].view(shape), self.sigmas[index].view(shape)
        # dtype before device: some accelerators have no float64.
        return alpha.to(like.dtype).to(like.device), sigma.to(like.dtype).to(like.device)

    def add_noise(self, x0: Batch, eps: Batch, t: Times) -> Batch:
        """Return x_t = alpha_t x0 + sigma_t eps, but exactly eps where t = T (eq 1 and eq 24 of
        arXiv 2402.13929).
        """
        alpha, sigma = self.coefficients(t, x0)
        is_top = (t == self.num_times).to(x0.device).view(alpha.shape)
        return torch.where(is_top, eps, alpha * x0 + sigma * eps)
