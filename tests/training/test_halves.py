"""Halved weights: what files of models hold."""

import torch
from torch import nn

from twostep.training.halves import halved


def test_fractions_are_halved_and_counts_stay() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    weights = {"wide": torch.rand(2, dtype=torch.float64), **norm.state_dict()}
    halves = halved(weights)
    assert halves.keys() == weights.keys()
    for name, value in weights.items():
        expected = value if name == "num_batches_tracked" else value.half()
        assert halves[name].dtype == expected.dtype
        assert torch.equal(halves[name], expected)


def test_weights_of_any_layout_lie_in_the_usual_one() -> None:
    weight = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    half = halved({"weight": weight})["weight"]
    assert half.is_contiguous()
    assert torch.equal(half, weight.half())
