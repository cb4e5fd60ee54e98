"""Roles: every way to start a network, how an average follows, and what others keep."""

import copy
from dataclasses import replace

import pytest
import torch

from twostep.distill.roles import (
    OptimiserSettings,
    adapter_on,
    copy_of,
    learner,
    moving_average_of,
    weights_of,
)
from twostep.models.bundle import Bundle
from twostep.networks.adapters import Lora, add_lora, has_lora
from twostep.networks.denoiser import Denoiser

OPTIMISER = OptimiserSettings(learning_rate=1e-4)


@pytest.fixture
def with_lora(teacher: Bundle) -> Denoiser:
    """The teacher's denoiser with a LoRA that changes something."""
    lora = add_lora(teacher.denoiser.network, "8-step", rank=4)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.05)
    return replace(teacher.denoiser, lora="8-step")


def eps(denoiser: Denoiser, teacher: Bundle) -> torch.Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = teacher.text.conditioning(["a red fox"], 64, 64)
    with torch.no_grad():
        return denoiser(x, torch.tensor([500]), conditioning).eps


def test_what_a_stage_trains_is_its_lora_or_the_whole_network(
    teacher: Bundle, with_lora: Denoiser
) -> None:
    assert weights_of(teacher.denoiser) is teacher.denoiser.network
    assert learner(with_lora, OPTIMISER).weights.state_dict().keys() == (
        Lora(with_lora.network, "8-step").state_dict().keys()
    )


def test_a_copy_answers_as_its_model_and_is_trained_alone(
    teacher: Bundle, with_lora: Denoiser
) -> None:
    role = copy_of(with_lora, OPTIMISER)
    assert role.model.lora is None
    torch.testing.assert_close(
        eps(role.model, teacher), eps(with_lora, teacher), atol=1e-4, rtol=1e-4
    )
    assert all(parameter.requires_grad for parameter in role.weights.parameters())
    assert role.model.network is not with_lora.network


def test_an_adapter_starts_as_its_model_and_goes_again(
    teacher: Bundle, with_lora: Denoiser
) -> None:
    running = add_lora(with_lora.network, "student", rank=4)
    role = adapter_on(with_lora, "fake score", rank=4, optimiser=OPTIMISER)
    torch.testing.assert_close(eps(role.model, teacher), eps(with_lora, teacher))
    assert all(parameter.requires_grad for parameter in running.parameters())
    assert all(parameter.requires_grad for parameter in role.weights.parameters())
    role.remove()
    assert not has_lora(with_lora.network, "fake score")
    assert has_lora(with_lora.network, "8-step")


@pytest.mark.parametrize("of_lora", [False, True], ids=["network", "lora"])
def test_a_moving_average_stays_behind(of_lora: bool, teacher: Bundle, with_lora: Denoiser) -> None:
    if of_lora:
        denoiser = with_lora
    else:
        network = copy.deepcopy(teacher.denoiser.network)
        denoiser = teacher.denoiser.with_network(network)
    weights_of(denoiser).requires_grad_(True)
    role = moving_average_of("student", denoiser, name="target", decay=0.75)
    assert all(parameter.requires_grad for parameter in weights_of(denoiser).parameters())
    assert role.optimiser is None
    assert role.follow is not None
    assert (role.follow.role, role.follow.decay) == ("student", 0.75)
    assert not any(parameter.requires_grad for parameter in role.weights.parameters())
    torch.testing.assert_close(eps(role.model, teacher), eps(denoiser, teacher))
    role.remove()
    assert not has_lora(denoiser.network, "target")
