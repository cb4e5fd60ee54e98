"""`benchmarks/trainer_profile.py` counts what is read, and tells what would wait from what not."""

import pytest
import torch
from torch import nn
from trainer_profile import STAGES, count, count_stage

from twostep.diffusion import landing
from twostep.models.loading import load_bundle


def test_reads_are_told_apart() -> None:
    network = nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(network.parameters(), fused=True)

    def iterate() -> None:
        network(torch.ones(1, 2)).sum().backward()
        optimiser.step()
        landing(torch.tensor([1000, 500]), 4)
        assert network.weight.sum().item() < 10
        assert network.bias.isfinite().all()

    iterate()
    counts = count(iterate)
    # Its count of steps for the weight and for the bias.
    assert counts.in_optimiser == 2
    # The least and the highest time.
    assert counts.of_times == 2
    assert dict(counts.others) == {"outside the package": 2}
    assert counts.operators["aten::item"] == 2 + 2 + 2
    assert counts.operators["aten::is_nonzero"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_an_iteration_reads_nothing_that_would_wait(name: str) -> None:
    teacher = load_bundle("nano")
    teacher.denoiser.network.requires_grad_(False).eval()
    counts = count_stage(STAGES[name], teacher, 2)
    assert not counts.others
    assert counts.of_times > 0
    assert counts.in_optimiser > 0
