"""Two processes with half of every batch each get the gradients that one gets of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..distill.launching import launch

WORK = """
from pathlib import Path
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twostep.training.processes import averaged, joined, largest, world
from twostep.training.replicas import Replica


class Two(nn.Module):
    # Of the layers the last is used by nobody, and the middle one only where it is asked for.
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, middle):
        x = checkpoint(self.first, x, use_reentrant=False)
        return self.middle(x) if middle else x


with joined(torch.device("cpu")):
    network = Two()
    replica = Replica(network)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    kept = []

    def gradients():
        found = {{key: value.grad for key, value in network.named_parameters()}}
        kept.append({{key: value.clone() for key, value in found.items() if value is not None}})
        network.zero_grad(set_to_none=True)

    def share(whole):
        return whole[world().share(len(whole))]

    for middle in (True, False, True):
        replica.loss(lambda: network(share(x), middle).square().mean()).backward()
        gradients()
    # What was computed before the loss is asked for, as a pair is drawn before its turn.
    landing = network(share(x), True)
    replica.loss(lambda: landing.square().mean()).backward()
    gradients()
    # Two parts, of which the last one sends the sums.
    for number, part in enumerate((x[:4], x[4:])):
        loss = replica.loss(
            lambda: network(share(part), True).square().mean(), is_last=number == 1
        )
        (loss / 2).backward()
    gradients()
    kept.append(averaged([{{"a": float(world().rank), "b": 2.0}}, {{"c": 1.0 + world().rank}}]))
    kept.append(largest([float(world().rank), 3.0 - world().rank]))
    if world().is_first:
        torch.save(kept, Path({out!r}))
"""


def run(folder: Path, count: int) -> list[object]:
    out = folder / f"{count}.pt"
    both = launch(WORK.format(out=str(out)), folder / f"said by {count}", count=count)
    assert both.finish() == [0] * count, both.said()
    found: list[object] = torch.load(out, weights_only=True)
    return found


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    *alone, figures, most = run(tmp_path, 1)
    *together, averages, largest = run(tmp_path, 2)
    assert len(alone) == 5
    for expected, found in zip(alone, together, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert "middle.weight" in alone[0]
    assert "middle.weight" not in alone[1]
    assert not any(key.startswith("last") for each in together for key in each)
    assert figures == [{"a": 0.0, "b": 2.0}, {"c": 1.0}]
    assert averages == [{"a": 0.5, "b": 2.0}, {"c": 1.5}]
    assert (most, largest) == ([0.0, 3.0], [1.0, 3.0])
