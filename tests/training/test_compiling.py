"""Blocks that are compiled train as they did, under the names that they had."""

import copy

import pytest
import torch
from torch import Tensor, nn

from twostep.training.compiling import compile_blocks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.layer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(nn.functional.silu(self.norm(x)))
        return out


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(4), nn.AvgPool2d(2), Block(4), nn.Conv2d(4, 3, 1))


def test_what_is_compiled_keeps_its_names_and_can_be_copied() -> None:
    plain, compiled = network(), network()
    assert compile_blocks(compiled, ("Block",)) == 2
    assert compile_blocks(compiled, ("Conv3d",)) == 0
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(compiled).half()
    assert copied[0].layer.weight.dtype == torch.float16


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients() -> None:
    plain, compiled = network(), network()
    compile_blocks(compiled, ("Block",))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (plain, compiled):
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for expected, found in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
