"""The meter of fake tensors: bytes of what lives, and the peak of them."""

import copy

import torch
from torch import nn
from torch.nn import functional

from twostep.training.memory import Meter, computing_off_cpu


def test_living_bytes_and_their_peak_are_counted() -> None:
    with Meter() as meter:
        first = torch.zeros(1000)
        assert meter.living == meter.peak == 4000
        second = torch.zeros(500, dtype=torch.float64)
        view = second[:10]
        assert meter.living == 8000
        del second
        assert meter.living == 8000
        del view
        assert (meter.living, meter.peak) == (4000, 8000)
        del first
        assert meter.living == 0


def test_a_network_is_copied_and_moved_as_if_it_were_real() -> None:
    with Meter() as meter:
        model = nn.Linear(10, 10, bias=False)
        twin = copy.deepcopy(model)
        assert meter.living == 2 * 400
        nn.Module.to(twin, torch.bfloat16)
        assert meter.living == 400 + 200


def test_a_value_that_is_asked_for_is_one() -> None:
    with Meter():
        assert torch.zeros(1).item() == 1.0
        assert torch.zeros(3, dtype=torch.int64).max().item() == 1
        noise = torch.randn(4, generator=torch.Generator().manual_seed(0))
        assert noise.shape == (4,)


def attention_peak() -> int:
    with Meter() as meter:
        query = torch.zeros(1, 2, 512, 8)
        functional.scaled_dot_product_attention(query, query, query)
        return meter.peak


def test_attention_off_the_cpu_needs_no_matrix_of_scores() -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = attention_peak()
    with computing_off_cpu():
        fused = attention_peak()
    assert plain > 2 * 512 * 512 * 4 > fused


def test_norms_off_the_cpu_compute_in_float32_under_autocast() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    norm = nn.LayerNorm(4)
    with computing_off_cpu(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    attention = functional.scaled_dot_product_attention
    with computing_off_cpu():
        assert functional.scaled_dot_product_attention is not attention
    assert functional.scaled_dot_product_attention is attention
