"""LoRA: it reaches what the paper says, changes nothing at first, trains alone, and merges into the
same function.
"""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from twostep.models.bundle import Bundle
from twostep.networks.adapters import (
    LoraError,
    activate,
    active,
    add_lora,
    checkpoint_gradients,
    choose_layers,
    load_lora,
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


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("attention",), 70 * 2 * 4),
        (("self-attention",), 70 * 4),
        (("cross-attention", "feed-forward"), 70 * (4 + 2)),
        (("projections",), 11 * 2),
        (("convolutions",), 17 * 2 + 11 + 4),
        (("time",), 17),
        (("to_k", "attn2.to_k"), 70 * 2),
        (("mid_block.*",), 10 * (8 + 2) + 2 + 2 * 3),
        (("down_blocks.*.attn2.*",), (2 * 2 + 2 * 10) * 4),
        (("attention", "feed-forward", "projections", "convolutions", "time"), 788),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_groups_and_patterns_mean_the_layers_of_sdxl(names: tuple[str, ...], count: int) -> None:
    """70 blocks of two attentions in 11 transformers, 17 residual blocks, 4 samplers."""
    assert len(choose_layers(sdxl_outline(), names)) == count


@cache
def sdxl_outline() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(SDXL.read_text()))


def test_what_means_no_layer_is_told(bundle: Bundle) -> None:
    network = bundle.denoiser.network
    with pytest.raises(LoraError, match=r"called .atention.\. Give some of attention, self-attent"):
        choose_layers(network, ["feed-forward", "atention"])
    # The first and the last layer get none.
    with pytest.raises(LoraError, match="called 'conv_in'"):
        choose_layers(network, ["conv_in"])
    layers = choose_layers(network, ["attn2.to_*"])
    assert add_lora(network, "student", rank=4, targets=layers).layers == set(layers)


def test_alpha_scales_what_it_does(bundle: Bundle) -> None:
    """An alpha of three times the rank trebles it, in the network as in the weights of a file."""
    network = bundle.denoiser.network
    lora = add_lora(network, "student", rank=4, alpha=12.0)
    assert (lora.rank, lora.alpha) == (4, 12)
    shake(lora)
    layer = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    down, up = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    expected = layer.base_layer(x) + 3 * x @ down.T @ up.T
    activate(network, "student")
    torch.testing.assert_close(layer(x), expected)
    before = answer(bundle, "student")
    plain = add_lora(network, "plain", rank=4)
    plain.load_state_dict(lora.scaled_state_dict())
    torch.testing.assert_close(answer(bundle, "plain"), before)


def test_it_drops_inputs_in_the_block_alone(bundle: Bundle) -> None:
    """What is left is enlarged by as much, and the base drops nothing."""
    network = bundle.denoiser.network
    lora = add_lora(network, "student", rank=4)
    shake(lora)
    layer = network.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    activate(network, "student")
    before = layer(x)
    with lora.dropout(0.25):
        torch.manual_seed(1)
        dropped = layer(x)
    down, up = layer.lora_A["student"].weight, layer.lora_B["student"].weight
    assert not torch.allclose(dropped, before)
    torch.manual_seed(1)
    kept = torch.nn.functional.dropout(torch.ones_like(x), 0.25)
    torch.testing.assert_close(dropped, layer.base_layer(x) + (kept * x) @ down.T @ up.T)
    assert torch.equal(layer(x), before)


def test_a_file_starts_an_adapter_of_any_alpha(bundle: Bundle, tmp_path: Path) -> None:
    """It does what the file's LoRA does, whose layers may be fewer."""
    network = bundle.denoiser.network
    layers = choose_layers(network, ["attention"])
    lora = add_lora(network, "first", rank=4, alpha=2.0, targets=layers)
    shake(lora)
    expected = answer(bundle, "first")
    path = tmp_path / "first.safetensors"
    save_file({f"unet.{key}": value for key, value in lora.scaled_state_dict().items()}, path)
    started = load_lora(network, "second", path, alpha=8.0)
    assert (started.alpha, started.layers) == (8, set(layers))
    torch.testing.assert_close(answer(bundle, "second"), expected, atol=1e-5, rtol=1e-4)
    more = choose_layers(network, ["attention", "time"])
    assert load_lora(network, "third", path, only=more).layers == set(more)
    torch.testing.assert_close(answer(bundle, "third"), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(LoraError, match="layers that lora_targets leaves out"):
        load_lora(network, "fourth", path, only=choose_layers(network, ["cross-attention"]))


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
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(False)
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
