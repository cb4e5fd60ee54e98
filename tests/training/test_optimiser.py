"""One optimiser step: AdamW with clipping, at a factor of the peak learning rate."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twostep.training.optimiser import OptimiserState, Trainable, make_optimiser, optimiser_step
from twostep.training.recipe import RecipeError


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def loss_of(model: nn.Module, scale: float = 1.0) -> Tensor:
    return scale * model(torch.ones(2, 4)).square().mean()


def weights_after(step: Callable[[nn.Module], None]) -> Tensor:
    model = network()
    step(model)
    return model.weight.detach()


def test_a_network_is_trainable() -> None:
    assert isinstance(network(), Trainable)


def test_it_is_adamw_with_a_clipped_gradient() -> None:
    def ours(model: nn.Module) -> None:
        optimiser = make_optimiser(model, 0.1, betas=(0.5, 0.9), weight_decay=0.2)
        for _ in range(3):
            optimiser_step(loss_of(model, 100.0), optimiser, model, clip=0.5, factor=1.0)

    def theirs(model: nn.Module) -> None:
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=0.1, betas=(0.5, 0.9), weight_decay=0.2, fused=True
        )
        for _ in range(3):
            loss_of(model, 100.0).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimiser.step()
            optimiser.zero_grad()

    assert torch.equal(weights_after(ours), weights_after(theirs))


def test_it_returns_the_norm_before_clipping_and_leaves_no_gradient() -> None:
    model = network()
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    optimiser = make_optimiser(model, 0.1)
    norm = optimiser_step(loss_of(model), optimiser, model, clip=1e-3, factor=1.0)
    assert norm == pytest.approx(expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_factor_is_of_the_peak_also_after_a_checkpoint() -> None:
    model = network()
    optimiser = make_optimiser(model, 0.1)
    optimiser_step(loss_of(model), optimiser, model, clip=1.0, factor=0.5)
    again = make_optimiser(model, 0.1)
    again.load_state_dict(optimiser.state_dict())
    optimiser_step(loss_of(model), again, model, clip=1.0, factor=0.25)
    assert again.param_groups[0]["lr"] == 0.1 * 0.25


def test_a_run_that_goes_on_takes_the_settings_of_now_and_the_moments_of_then() -> None:
    def stepped(rate: float, decay: float, state: dict[str, Any] | None) -> OptimiserState:
        model = network()
        optimiser = make_optimiser(model, rate, betas=(0.5, 0.9), weight_decay=decay)
        kept = OptimiserState(optimiser)
        if state is not None:
            kept.load_state_dict(state)
        optimiser_step(loss_of(model), optimiser, model, clip=1.0, factor=0.5)
        return kept

    optimiser = stepped(0.01, 0.3, stepped(0.1, 0.2, None).state_dict()).optimiser
    group = optimiser.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.005, 0.3, (0.5, 0.9))
    assert [value["step"].item() for value in optimiser.state.values()] == [2, 2]


def test_a_missing_8_bit_optimiser_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RecipeError, match=r'"adamw8bit" needs `pip install twostep\[eight-bit\]`'):
        make_optimiser(network(), 0.1, name="adamw8bit")
