"""LoRA: it reaches what the paper says, changes nothing at first, trains alone, and merges into the
same function.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer

from twostep.models.bundle import Bundle
from twostep.networks.adapters import (
    LoraError,
    activate,
    active,
    add_lora,
    checkpoint_gradients,
    merge,
    remove_lora,
    remove_loras,
)
from twostep.pretrain.model import random_bundle

SDXL = Path(__file__).parents[2] / "benchmarks" / "sdxl_unet.json"


@pytest.fixture
def bundle() -> Bundle:
    return random_bundle()


def answer(bundle: Bundle, lora: str | None = None) -> torch.Tensor:
    x_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = bundle.conditioning(["a red fox", ""], 64, 64)
    return replace(bundle.denoiser, lora=lora)(x_t, torch.tensor([1000, 400]), conditioning).eps


def shake(lora, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_on_sdxl_it_reaches_what_the_paper_says() -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads(SDXL.read_text()))
        lora = add_lora(network, "student", rank=64)
    parameters = list(lora.parameters())
    assert len(parameters) == 2 * 788
    assert sum(parameter.numel() for parameter in parameters) == 196_751_360
    assert (
        sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        == 196_751_360
    )


def test_fresh_it_changes_nothing_and_shaken_it_does(bundle: Bundle) -> None:
    before = answer(bundle)
    lora = add_lora(bundle.denoiser.network, "student", rank=4)
    torch.testing.assert_close(answer(bundle, "student"), before)
    shake(lora)
    assert not torch.allclose(answer(bundle, "student"), before, atol=1e-2)
    torch.testing.assert_close(answer(bundle), before)


def test_switching_between_forward_and_backward_loses_no_gradient(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    teacher, student = add_lora(network, "teacher", rank=4), add_lora(network, "student", rank=4)
    shake(student)
    shake(teacher, 2)
    loss = answer(bundle, "student").square().mean()
    activate(network, "teacher")
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().max() > 0
        for parameter in student.parameters()
    )
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_switching_is_right_after_adapters_came_and_went_and_copies_switch_apart(
    bundle: Bundle,
) -> None:
    network = bundle.denoiser.network
    plain = answer(bundle)
    shake(add_lora(network, "judge", rank=4, encoder_only=True))
    judged = answer(bundle, "judge")
    shake(add_lora(network, "student", rank=4), 2)
    taught = answer(bundle, "student")
    add_lora(network, "passing", rank=4)
    activate(network, "passing")
    remove_lora(network, "passing")
    twin = replace(bundle, denoiser=bundle.denoiser.with_network(copy.deepcopy(network)))
    activate(twin.denoiser.network, "judge")
    network.disable_adapters()
    for one in (bundle, twin):
        for lora, expected in (
            ("student", taught),
            (None, plain),
            ("judge", judged),
            ("student", taught),
        ):
            torch.testing.assert_close(answer(one, lora), expected)
            assert active(one.denoiser.network) == lora
    remove_loras(network)
    torch.testing.assert_close(answer(bundle), plain)
    with pytest.raises(LoraError, match=r"called 'student'.*there are none"):
        activate(network, "student")
    torch.testing.assert_close(answer(twin, "student"), taught)


def test_merged_it_is_the_same_function_and_a_plain_network(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    plain = list(network.state_dict())
    shake(add_lora(network, "student", rank=4))
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scaling["student"] = 0.5
    expected = answer(bundle, "student")
    merged = bundle.denoiser.with_network(merge(network, "student"))
    assert list(merged.network.state_dict()) == plain
    torch.testing.assert_close(
        answer(replace(bundle, denoiser=merged)), expected, atol=1e-4, rtol=1e-4
    )


def test_taken_off_it_leaves_the_base_as_it_was(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    shake(add_lora(network, "student", rank=4))
    remove_loras(network)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_its_weights_travel_between_adapters_and_nothing_else_fits(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    one, other = add_lora(network, "one", rank=4), add_lora(network, "other", rank=4)
    shake(one)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(answer(bundle, "other"), answer(bundle, "one"))
    assert not torch.allclose(answer(bundle, "other"), answer(bundle), atol=1e-2)
    state = copy.copy(one.state_dict())
    state.pop(next(iter(state)))
    with pytest.raises(LoraError, match="1 keys differ"):
        other.load_state_dict(state)
    with pytest.raises(LoraError, match="another rank"):
        add_lora(network, "wide", rank=8).load_state_dict(one.state_dict())
    with pytest.raises(LoraError, match=r"called 'ghost'.*one.*other"):
        activate(network, "ghost")


def test_for_an_encoder_the_decoder_is_left_out(bundle: Bundle) -> None:
    names = list(add_lora(bundle.denoiser.network, "judge", rank=4, encoder_only=True).state_dict())
    assert names
    assert all(key.startswith(("down_blocks.", "mid_block.")) for key in names)


def test_blocks_are_computed_anew_with_the_adapter_they_were_computed_with(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    student, teacher = add_lora(network, "student", rank=4), add_lora(network, "teacher", rank=4)
    shake(student)
    shake(teacher, 2)
    for parameter in student.parameters():
        parameter.requires_grad_(True)

    def gradients() -> list[torch.Tensor]:
        loss = answer(bundle, "student").square().mean()
        activate(network, "teacher")
        loss.backward()
        found = [parameter.grad.clone() for parameter in student.parameters()]
        for parameter in student.parameters():
            parameter.grad = None
        return found

    expected = gradients()
    checkpoint_gradients(network)
    found = gradients()
    assert active(network) == "student"  # so blocks really were computed anew
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(parameter.grad is None for parameter in teacher.parameters())
