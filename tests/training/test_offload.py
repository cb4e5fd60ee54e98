"""Offloaded state: the same numbers, and never more of it brought than one portion's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from twostep.training import offload
from twostep.training.offload import OffloadedState, bytes_at_once, portions
from twostep.training.optimiser import (
    OptimiserName,
    OptimiserState,
    make_optimiser,
    state_bytes,
    step_down,
)

NAMES: tuple[OptimiserName, ...] = ("adamw", "adafactor", "prodigy", "lion")
PORTION = 4 * 100


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 2))


def walk(model: nn.Module, state: OptimiserState, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        step_down(state, model, clip=1.0, factor=1 - step / 100)


def made(name: OptimiserName, **portion: int) -> tuple[nn.Module, OptimiserState]:
    model = network()
    optimiser = make_optimiser(model, 1.0 if name == "prodigy" else 0.01, name=name)
    if portion:
        return model, OffloadedState(optimiser, name, **portion)
    return model, OptimiserState(optimiser)


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_or_not_every_number_is_the_same(name: OptimiserName) -> None:
    plain, state = made(name)
    walk(plain, state, 0, 12)
    there, state = made(name, portion_bytes=PORTION)
    walk(there, state, 0, 5)
    # Resumed without offloading, and with it again.
    kept = copy.deepcopy((there.state_dict(), state.state_dict()))
    between, state = made(name)
    between.load_state_dict(kept[0])
    state.load_state_dict(kept[1])
    walk(between, state, 5, 8)
    kept = copy.deepcopy((between.state_dict(), state.state_dict()))
    back, state = made(name, portion_bytes=PORTION)
    back.load_state_dict(kept[0])
    state.load_state_dict(kept[1])
    walk(back, state, 8, 12)
    for one, other in zip(plain.parameters(), back.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_brought_by_portions_and_taken_back(
    name: OptimiserName, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: set[int] = set()
    most = 0
    model, state = made(name, portion_bytes=PORTION)
    assert isinstance(state, OffloadedState)
    place = torch.device("cpu")

    def move(value: torch.Tensor, device: torch.device) -> torch.Tensor:
        nonlocal most
        # There is one device here: the main memory is told from it by being the module's own.
        copied = value.clone()
        if device is offload._MAIN_MEMORY:
            brought.discard(id(value))
        else:
            assert device == place
            brought.add(id(copied))
            alive.append(copied)
        living = {
            id(tensor): tensor.numel() * tensor.element_size()
            for kept in state.optimiser.state.values()
            for key, tensor in kept.items()
            if torch.is_tensor(tensor) and key != "step" and id(tensor) in brought
        }
        if copied.dim() and id(copied) in brought:
            living[id(copied)] = copied.numel() * copied.element_size()
        most = max(most, sum(living.values()))
        return copied

    alive: list[torch.Tensor] = []
    monkeypatch.setattr(offload, "moved", move)
    walk(model, state, 0, 1)
    assert not brought and most == 0, "nothing is there before the first step"
    walk(model, state, 1, 3)
    assert not brought
    shapes = [parameter.shape for parameter in model.parameters()]
    cut = list(portions(name, shapes, portion_bytes=PORTION))
    assert most == max(state_bytes(name, shapes[first:last]) for first, last in cut)
    assert len(cut) == (1 if name == "prodigy" else 4)
    if name != "prodigy":
        assert most < state_bytes(name, shapes)


def test_portions_hold_what_fits_and_everything_once() -> None:
    shapes = [(10,), (30,), (100,), (10,), (5, 6), (1,)]
    assert list(portions("adamw", shapes, portion_bytes=4 * 40)) == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert list(portions("prodigy", shapes, portion_bytes=4 * 40)) == [(0, 6)]
    assert bytes_at_once("lion", shapes) == state_bytes("lion", shapes)


def test_parameters_without_gradients_stay_as_they_are() -> None:
    model, state = made("adamw", portion_bytes=4)
    first = model[0].weight.detach().clone()
    model[0].requires_grad_(False)
    walk(model, state, 0, 2)
    assert torch.equal(model[0].weight, first)
    kept: dict[Any, Any] = state.state_dict()["state"]
    assert sorted(kept) == [2, 3, 4, 5]
    assert all(parameter.grad is None for parameter in model.parameters())
