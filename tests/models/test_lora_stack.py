"""LoRAs on a model: the right one changes it by its weight, the wrong one is told, and the contract
follows.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from twostep.contract import ContractError
from twostep.formats import resolve
from twostep.formats.locate import ModelError, find_model
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.networks.adapters import PREFIX, add_lora

TARGETS = ("to_q", "to_v")


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A LoRA of rank 2 on queries and values alone, as diffusers would write one."""
    lora = add_lora(load_bundle("nano").denoiser.network, "style", rank=2, targets=TARGETS)
    generator = torch.Generator().manual_seed(0)
    weights = {
        PREFIX + key: torch.randn(v.shape, generator=generator) / 4
        for key, v in lora.state_dict().items()
    }
    save_file(weights, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def answer(bundle: Bundle) -> torch.Tensor:
    x, t = (
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1000]),
    )
    return bundle.denoiser(x, t, bundle.conditioning(["a red fox"], 64, 64)).eps


def test_a_style_counts_by_its_weight_and_is_named(style: Path) -> None:
    plain = load_with_loras("nano", [], steps=2)
    bundles = {
        weight: load_with_loras("nano", [f"{style}:{weight}"], steps=2) for weight in (0, 0.5, 1)
    }
    torch.testing.assert_close(answer(bundles[0]), answer(plain))
    assert (
        (answer(bundles[1]) - answer(plain)).abs().mean()
        > (answer(bundles[0.5]) - answer(plain)).abs().mean()
        > 0
    )
    twice = load_with_loras("nano", [f"{style}:0.5", f"{style}:0.5"], steps=2)
    torch.testing.assert_close(answer(twice), answer(bundles[1]), atol=1e-4, rtol=1e-4)
    assert twice.contract == replace(plain.contract, name="nano-2step+style:0.5+style:0.5")
    assert bundles[1].contract.name == "nano-2step+style"
    assert list(twice.denoiser.network.state_dict()) == list(plain.denoiser.network.state_dict())


def test_it_is_what_diffusers_makes_of_the_same_file(style: Path) -> None:
    alone = load_with_loras("nano", [str(style)], steps=32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        find_model("nano"), torch_dtype=torch.float32
    )
    pipeline.load_lora_weights(style)
    pipeline.fuse_lora(components=["unet"])
    theirs = replace(alone, denoiser=alone.denoiser.with_network(pipeline.unet))
    torch.testing.assert_close(answer(alone), answer(theirs), atol=1e-4, rtol=1e-4)


def test_alpha_in_diffusers_metadata_scales_it(style: Path) -> None:
    half = style.with_name("half.safetensors")
    save_file(
        load_file(style),
        half,
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 1})},
    )
    torch.testing.assert_close(
        answer(load_with_loras("nano", [str(half)], steps=2)),
        answer(load_with_loras("nano", [f"{style}:0.5"], steps=2)),
    )


def test_a_lora_that_makes_students_takes_the_teacher_and_its_steps_count(style: Path) -> None:
    patched = load_with_loras("nano", ["nano_4step_lora", str(style)])
    assert (patched.contract.steps, patched.contract.role) == (4, "student")
    assert patched.contract.name == "nano-4step+style"
    assert (
        load_with_loras("nano", ["nano_4step_lora"], steps=4).contract
        == resolve(find_model("nano_4step_lora")).contract
    )
    torch.testing.assert_close(
        answer(load_with_loras("nano", ["nano_4step_lora"])), answer(load_bundle("nano_4step_lora"))
    )
    with pytest.raises(ModelError, match="draws in 4 steps, not in 2"):
        load_with_loras("nano", ["nano_4step_lora"], steps=2)
    with pytest.raises(
        ContractError, match="is one of 2 steps already: it would be distilled twice"
    ):
        load_with_loras("nano_2step_lora", ["nano_4step_lora"])


def test_one_that_was_trained_on_a_student_goes_on_that_alone(style: Path) -> None:
    contract = replace(resolve("nano_2step_lora").contract, base="nano-2step", name="style-2step")
    contract = replace(contract, lora_rank=2, lora_alpha=2.0)
    path = style.with_name("trained.safetensors")
    save_file(load_file(style), path, contract.to_metadata())
    patched = load_with_loras("nano", [str(path)], steps=2)
    assert patched.contract.name == "nano-2step+trained"
    assert (
        load_with_loras("nano", [str(style), str(path)], steps=2).contract.name
        == "nano-2step+style+trained"
    )
    torch.testing.assert_close(
        answer(patched), answer(load_with_loras("nano", [str(style)], steps=2))
    )
    for steps in (4, 32):
        with pytest.raises(ContractError, match="was trained on nano-2step; this is nano"):
            load_with_loras("nano", [str(path)], steps=steps)
    with pytest.raises(ModelError, match=r"goes on nano-2step\. Load that"):
        load_bundle(path)


def test_what_does_not_fit_is_told(style: Path) -> None:
    wrong = style.with_name("wrong.safetensors")
    weights = load_file(style)
    key = next(iter(weights))

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, wrong)
        with pytest.raises(ModelError) as error:
            load_with_loras("nano", [str(wrong)], steps=2)
        return str(error.value)

    assert "lora_unet_x.lora_down.weight" in refusal({"lora_unet_x.lora_down.weight": weights[key]})
    assert "text_encoder.x.lora_A.weight" in refusal(
        {**weights, "text_encoder.x.lora_A.weight": torch.ones(2, 2)}
    )
    assert "its halves are [96, 2] and [1, 96]" in refusal(
        {**weights, key: weights[key][:1].clone()}
    )
    assert "no layer of unet" in refusal(
        {k.replace("down_blocks.1", "down_blocks.9"): v for k, v in weights.items()}
    )
    assert "lacks the down half" in refusal({k: v for k, v in weights.items() if k != key})
    wrong.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        load_with_loras("nano", [str(wrong)])
    with pytest.raises(ModelError, match="is a model folder"):
        load_with_loras("nano", ["nano"])
