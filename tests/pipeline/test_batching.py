"""In an exact batch every part has the bits that it has alone, whatever the kernels make of it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from twostep.pipeline.batching import ExactBatch

SIZES = (1, 3, 1, 2)

CONV = torch.randn(48, 48, 3, 3, generator=torch.Generator().manual_seed(1))
LINEAR = torch.randn(192, 192, generator=torch.Generator().manual_seed(2))


def convolve(x: Tensor) -> Tensor:
    return F.conv2d(x, CONV, padding=1)


def convolve_channels_last(x: Tensor) -> Tensor:
    return convolve(x.contiguous(memory_format=torch.channels_last))


def attend(x: Tensor) -> Tensor:
    heads = x.unflatten(2, (4, 48)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=False)


def multiply(x: Tensor) -> Tensor:
    return torch.bmm(x, x.transpose(1, 2)) @ x


CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": ((192,), lambda x: F.linear(x, LINEAR)),
    "linear of tokens": ((20, 192), lambda x: F.linear(x, LINEAR, LINEAR[0])),
    "conv": ((48, 8, 8), convolve),
    "conv, channels last": ((48, 8, 8), convolve_channels_last),
    "attention": ((20, 192), attend),
    "products": ((20, 192), multiply),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_guided", [False, True])
def test_every_part_has_what_it_has_alone(case: str, is_guided: bool) -> None:
    shape, operation = CASES[case]
    count = sum(SIZES)
    halves = 2 if is_guided else 1
    x = torch.randn(halves * count, *shape, generator=torch.Generator().manual_seed(3))
    with ExactBatch(SIZES):
        together = operation(x)
    start = 0
    for size in SIZES:
        rows = [half * count + row for half in range(halves) for row in range(start, start + size)]
        alone = operation(x[rows])
        assert torch.equal(together[rows], alone)
        start += size


def test_a_zero_layer_does_not_speak_for_others_of_its_shape() -> None:
    """What is known of a shape was measured with random numbers, not with the first that came."""
    shape = (48, 8, 8)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(4))
    with ExactBatch((1, 1, 1, 1)):
        F.conv2d(x, torch.zeros_like(CONV), padding=1)
        together = convolve(x)
    assert torch.equal(together, torch.cat([convolve(x[i : i + 1]) for i in range(4)]))


def test_other_operations_are_left_alone() -> None:
    x = torch.arange(6.0).view(2, 3)
    with ExactBatch((1, 1)):
        assert torch.equal(x.sum(dim=0), torch.tensor([3.0, 5.0, 7.0]))
        assert torch.equal(torch.matmul(torch.eye(3), torch.eye(3)), torch.eye(3))
