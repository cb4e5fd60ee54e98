"""The weight of an iteration's loss, at every ratio of signal to noise."""

import pytest
import torch

from tests.answering import Answering
from twostep.diffusion.schedule import VariancePreserving
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.teacher import noise_loss

OFF = 0.5
SCHEDULE = VariancePreserving.scaled_linear()


@pytest.mark.parametrize(("floor", "limit"), [(0.0, 5.0), (1.0, 5.0), (0.1, 100.0)])
@pytest.mark.parametrize("time", [50, 300, 1000])
def test_errors_in_x0_count_by_the_clamped_ratio(time: int, floor: float, limit: float) -> None:
    x0 = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    eps = torch.randn_like(x0)
    t = torch.tensor([time, time])
    alpha, sigma = SCHEDULE.coefficients(t[:1], x0[:1])
    snr = float(alpha / sigma) ** 2
    denoiser = Denoiser(Answering(x0 + OFF), SCHEDULE, "x0")
    nothing = Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1), torch.zeros(2, 6))
    loss = noise_loss(denoiser, x0, nothing, t, eps, snr_limit=limit, snr_floor=floor)
    assert float(loss) == pytest.approx(min(max(snr, floor), limit) * OFF**2)


def test_the_times_lie_on_both_sides_of_both_bounds() -> None:
    """The times above try something: the ratio is below 1, between, and above 5."""
    one = torch.ones(3, 4, 3, 3)
    alpha, sigma = SCHEDULE.coefficients(torch.tensor([50, 300, 1000]), one)
    high, middle, low = ((alpha / sigma) ** 2).flatten().tolist()
    assert high > 5 > middle > 1 > 0.1 > low
