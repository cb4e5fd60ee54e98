"""Optimisers by name, and one step of them with clipping, at a factor of the peak rate."""

import io
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from twostep.training.optimiser import (
    OptimiserName,
    OptimiserSettings,
    OptimiserState,
    Trainable,
    effective_rate,
    make_optimiser,
    optimiser_step,
    state_bytes,
)
from twostep.training.recipe import RecipeError

NAMES: tuple[OptimiserName, ...] = get_args(OptimiserName)
RATES = {"adamw": 0.02, "adamw8bit": 0.02, "adafactor": 0.1, "prodigy": 1.0, "lion": 0.01}


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


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("adamw8bit", "bitsandbytes.optim", "eight-bit"),
        ("prodigy", "pytorch_optimizer.optimizer", "optimisers"),
        ("lion", "pytorch_optimizer.optimizer", "optimisers"),
    ],
)
def test_a_missing_library_is_named_with_what_to_install(
    name: OptimiserName, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError, match=rf'"{name}" needs `pip install twostep\[{extra}\]`'):
        make_optimiser(network(), 0.1, name=name)


def walk(
    name: OptimiserName, gradients: Tensor, *, start: float, **options: Any
) -> tuple[list[float], list[float]]:
    """One number that goes down given gradients: where it was after each, and at what rates."""
    weight = nn.Parameter(torch.tensor([start]))
    module = nn.ParameterList([weight])
    optimiser = make_optimiser(module, name=name, **options)
    places, rates = [], []
    for gradient in gradients:
        optimiser_step((weight * gradient).sum(), optimiser, module, clip=1e9, factor=1.0)
        places.append(weight.item())
        rates.append(effective_rate(optimiser))
    return places, rates


GRADIENTS = torch.tensor([0.5, -0.15, -2.0, 0.3, 1.0, 0.9, -0.4, 0.2])


@pytest.mark.parametrize("betas", [None, (0.5, 0.8)])
def test_lion_goes_by_the_sign_of_what_it_interpolates(betas: tuple[float, float] | None) -> None:
    first, second = betas or (0.9, 0.99)
    expected, weight, average = [], 1.0, 0.0
    for gradient in GRADIENTS.tolist():
        weight *= 1 - 0.1 * 0.2
        weight -= 0.1 * math.copysign(1.0, first * average + (1 - first) * gradient)
        average = second * average + (1 - second) * gradient
        expected.append(weight)
    places, rates = walk(
        "lion", GRADIENTS, start=1.0, learning_rate=0.1, weight_decay=0.2, betas=betas
    )
    assert places == pytest.approx(expected, rel=1e-5)
    assert rates == [0.1] * len(GRADIENTS)


@pytest.mark.parametrize("betas", [None, (0.0, 0.99)])
def test_prodigy_follows_its_paper_and_tells_the_rate_that_it_finds(
    betas: tuple[float, float] | None,
) -> None:
    # Mostly downhill, so that it finds a way to go.
    gradients = [1 + 0.5 * math.sin(step) for step in range(60)]
    first, second = betas or (0.9, 0.999)
    kept = math.sqrt(second)
    # At zero, where float32 has digits enough for its first steps.
    weight = 0.0
    found, mean, square, numerator, total = 1e-6, 0.0, 0.0, 0.0, 0.0
    expected, rates = [], []
    for gradient in gradients:
        # Algorithm 4, with a factor of the rate which the total does not have.
        mean = first * mean + (1 - first) * found * gradient
        square = second * square + (1 - second) * (found * gradient) ** 2
        rate = 0.5 * found
        share = found / 1e-6
        numerator = kept * numerator + share * rate * gradient * (0.0 - weight)
        total = kept * total + share * found * gradient
        found = max(found, numerator / abs(total))
        weight -= rate * 0.1 * weight
        weight -= rate * mean / (math.sqrt(square) + found * 1e-8)
        expected.append(weight)
        rates.append(0.5 * found)
    places, told = walk(
        "prodigy",
        torch.tensor(gradients),
        start=0.0,
        learning_rate=0.5,
        weight_decay=0.1,
        betas=betas,
    )
    assert told == pytest.approx(rates, rel=1e-4, abs=0) and told[-1] > 10 * told[0]
    assert places == pytest.approx(expected, rel=1e-4, abs=0)


def test_adafactor_steps_relative_to_the_weights() -> None:
    # Its first second moment is the gradient's square, so every number moves by the same: by the
    # rate, times the root mean square of the weights.
    module = nn.ParameterList([nn.Parameter(torch.tensor([3.0, -4.0, 0.0, 12.0]))])
    optimiser = make_optimiser(module, 0.01, name="adafactor", weight_decay=0.5)
    before = module[0].detach().clone()
    loss = (module[0] * torch.tensor([1.0, -2.0, 3.0, 0.1])).sum()
    optimiser_step(loss, optimiser, module, clip=1e9, factor=1.0)
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    expected = before * (1 - 0.01 * 0.5) - 0.01 * 6.5 * signs
    torch.testing.assert_close(module[0].detach(), expected)


def test_betas_and_eps_reach_the_optimiser_and_its_own_stay_where_none_are_given() -> None:
    groups = [
        make_optimiser(network(), 1.0, name=name, betas=(0.1, 0.2), eps=1e-3).param_groups[0]
        for name in ("adamw", "adamw8bit", "prodigy")
    ]
    assert [(group["betas"], group["eps"]) for group in groups] == [((0.1, 0.2), 1e-3)] * 3
    own = {name: make_optimiser(network(), 1.0, name=name).param_groups[0] for name in NAMES}
    assert [own[name].get("betas") for name in NAMES] == [
        *((0.9, 0.999), (0.9, 0.999), None, (0.9, 0.999), (0.9, 0.99))
    ]
    assert {own[name]["eps"] for name in ("adamw", "adamw8bit", "prodigy")} == {1e-8}


def convolutions() -> nn.Sequential:
    """Parameters of every shape that there is, one of them large enough for 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3), nn.Conv2d(40, 120, 1), nn.Flatten(), nn.Linear(480, 2)
    )


def learn(model: nn.Module, optimiser: torch.optim.Optimizer, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        pictures = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step % 4))
        aims = torch.stack([pictures.mean((1, 2, 3)), pictures[:, 0, 0, 0]], dim=1)
        loss = (model(pictures) - aims).square().mean()
        optimiser_step(loss, optimiser, model, clip=1.0, factor=1 - step / 100)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_learns_and_goes_on_from_a_file_bit_for_bit(name: OptimiserName) -> None:
    def made() -> tuple[nn.Module, OptimiserState]:
        model = convolutions()
        return model, OptimiserState(make_optimiser(model, RATES[name], name=name))

    whole, state = made()
    losses = learn(whole, state.optimiser, 0, 40)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    cut, state = made()
    learn(cut, state.optimiser, 0, 25)
    file = io.BytesIO()
    torch.save({"weights": cut.state_dict(), "optimiser": state.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)
    resumed, state = made()
    resumed.load_state_dict(kept["weights"])
    state.load_state_dict(kept["optimiser"])
    learn(resumed, state.optimiser, 25, 40)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_that_an_optimiser_keeps_are_known_beforehand(name: OptimiserName) -> None:
    model = convolutions()
    optimiser = make_optimiser(model, RATES[name], name=name)
    learn(model, optimiser, 0, 1)
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for kept in optimiser.state.values()
        for key, value in kept.items()
        # The tables by which 8 bits are read are shared by all parameters.
        if torch.is_tensor(value) and key != "step" and not key.startswith("qmap")
    }
    assert sum(storages.values()) == state_bytes(name, [each.shape for each in model.parameters()])


class Halves(nn.Module):
    """Two numbers that learn at their own rates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def parameter_groups(self) -> list[Any]:
        return [iter([self.first]), iter([self.second])]


def test_prodigy_refuses_rates_of_groups_and_warns_of_a_rate_of_adam() -> None:
    with pytest.raises(RecipeError, match=r"one learning rate for all .* \(1, 0.5\)"):
        make_optimiser(Halves(), 1.0, name="prodigy", group_rates=(1.0, 0.5))
    with pytest.warns(UserWarning, match="with learning_rate, 1e-05: 1 is usual"):
        make_optimiser(network(), 1e-5, name="prodigy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_optimiser(Halves(), 1.0, name="prodigy", group_rates=(1.0, 1.0))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimiser": "adam"}, "'adamw', 'adamw8bit', 'adafactor', 'prodigy' or 'lion'"),
        ({"optimiser": "adafactor", "betas": (0.9, 0.99)}, "adafactor has no betas"),
        ({"optimiser": "adafactor", "eps": 1e-6}, "adafactor has no eps"),
        ({"optimiser": "lion", "eps": 1e-6}, "lion has no eps"),
        ({"betas": (0.9, 1.0)}, "less than 1"),
        ({"betas": (0.9,)}, "Field required"),
        ({"eps": 0.0}, "greater than 0"),
    ],
)
def test_options_that_an_optimiser_does_not_know_are_refused(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        OptimiserSettings(iterations=1, batch_size=1, learning_rate=1.0, **values)
    if "adam" not in values.get("optimiser", "adam"):
        given = {key: value for key, value in values.items() if key != "optimiser"}
        with pytest.raises(RecipeError, match=said):
            make_optimiser(network(), 1.0, name=values["optimiser"], **given)
