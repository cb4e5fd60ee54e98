"""The meter of fake tensors: bytes of what lives, and the peak of them."""

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves

import twostep
from twostep.networks.lean.blocks import Attention
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


def test_networks_call_what_is_patched() -> None:
    """Whoever imports one of these functions by its name has torch's own, whatever is patched."""
    patched = {"scaled_dot_product_attention", "group_norm", "layer_norm"}
    imported = {
        (path.name, alias.name)
        for path in Path(twostep.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "torch.nn.functional"
        for alias in node.names
    }
    assert len(imported) > 5
    assert not [name for name in imported if name[1] in patched]


def test_the_attention_of_lean_networks_needs_no_matrix_of_scores_off_the_cpu() -> None:
    with computing_off_cpu(), Meter() as meter:
        Attention(16, 2)(torch.zeros(1, 512, 16))
    assert meter.peak < 512 * 512 * 4


def test_norms_off_the_cpu_compute_in_float32_under_autocast() -> None:
    x = torch.zeros(2, 4, dtype=torch.bfloat16)
    norm = nn.LayerNorm(4)
    with computing_off_cpu(), torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.float32
    attention = functional.scaled_dot_product_attention
    with computing_off_cpu():
        assert functional.scaled_dot_product_attention is not attention
    assert functional.scaled_dot_product_attention is attention


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x + 1,
    "of whole numbers": lambda x: x.long() + 1,
    "of fractions": lambda x: x.long() + 1.0,
    "mixed": lambda x: x.half() * torch.ones((), dtype=torch.float32),
    "several": lambda x: x.max(dim=1),
    "written": lambda x: x.mul_(2),
    "written in part": lambda x: x[1:].zero_(),
    "view": lambda x: x.view(6, 4),
    "transposed": lambda x: x.t(),
    "view of the transposed": lambda x: x.t()[1:].unsqueeze(0),
    "of the transposed": lambda x: x.t().relu(),
    "dense again": lambda x: x.t().reshape(24),
    "parts": lambda x: x.split(2),
    "expanded": lambda x: x[:1].expand(5, 6),
    "detached": lambda x: x.detach(),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "the same dtype": lambda x: x.to(torch.float32),
    "joined": lambda x: torch.cat([x, x[:2]]),
    "convolved": lambda x: functional.conv1d(x[None], torch.ones(3, 4, 1)),
    "normed": lambda x: functional.layer_norm(x, [6]),
    "nothing": lambda x: x[:0] + 1,
}


def layouts(operation: Callable[[Tensor], Any], meter: Meter) -> list[tuple[Any, ...]]:
    """Return how the results of an operation lie, and the bytes that it adds."""
    x = torch.ones(4, 6)
    before = meter.living
    result = operation(x)
    return [
        (
            each.size(),
            each.stride(),
            each.storage_offset(),
            each.dtype,
            each.device,
            each.untyped_storage()._cdata == x.untyped_storage()._cdata,
            meter.living - before,
        )
        for each in tree_leaves(result)
    ]


def test_what_a_meter_remembers_is_what_torch_computes() -> None:
    expected = {}
    for name, operation in OPERATIONS.items():
        with Meter() as fresh:
            expected[name] = layouts(operation, fresh)
    with Meter() as meter:
        for _ in range(2):
            found = {name: layouts(operation, meter) for name, operation in OPERATIONS.items()}
            assert found == expected


def test_what_torch_computed_once_it_is_not_asked_again() -> None:
    with Meter():
        x, y = torch.ones(4, 6), torch.ones(6, 2)
        assert (x @ y).shape == (4, 2)
        with patch.object(FakeTensorMode, "dispatch", side_effect=AssertionError):
            assert (x @ y).shape == (4, 2)
            with pytest.raises(AssertionError):
                x @ x.t()
