"""A cache: fused or not, the same picture; the model stays as it was; and stacks do not disturb
each other.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from twostep.contract import ContractError
from twostep.diffusion import initial_noise, sample
from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import LoraError, LowRank, write_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.lora_stack import LoraCache
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)


def write_style(path: Path, bundle: Bundle, seed: int, rank: int) -> None:
    """Write a LoRA on every layer of UNet and text encoders, a 50th as strong as the weights
    themselves.
    """
    generator, lora = torch.Generator().manual_seed(seed), {}
    for part, network in bundle.parts.items():
        for name, module in network.named_modules():
            if isinstance(module, LAYERS):
                weight = module.weight
                down = torch.randn((rank, *weight.shape[1:]), generator=generator)
                up = torch.randn(
                    (len(weight), rank, *[1] * (weight.dim() - 2)), generator=generator
                )
                strength = 0.02 * weight.norm() / (up.flatten(1) @ down.flatten(1)).norm()
                lora[f"{part}.{name}"] = LowRank(down, up * strength * rank, 1.0)
    save_file(write_lora(lora, bundle.parts, "kohya")[0], path)


@pytest.fixture(scope="module")
def base() -> Bundle:
    return load_bundle("nano")


@pytest.fixture(scope="module")
def styles(base: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two styles of different ranks, with their weights."""
    folder = tmp_path_factory.mktemp("styles")
    write_style(folder / "ink.safetensors", base, 1, rank=3)
    write_style(folder / "wool.safetensors", base, 2, rank=5)
    return [f"{folder / 'ink.safetensors'}:0.8", f"{folder / 'wool.safetensors'}:-0.5"]


def latents(bundle: Bundle, num_images: int = 4) -> torch.Tensor:
    noise = torch.stack(
        [initial_noise(seed, bundle.latent_shape(64, 64)) for seed in range(num_images)]
    )
    conditioning = bundle.conditioning(["a 3d red apple on a blue background"] * num_images, 64, 64)
    with torch.inference_mode():
        return sample(
            bundle.denoiser.with_conditioning(conditioning),
            noise,
            bundle.contract.steps,
            bundle.denoiser.schedule,
        )


def pixels(bundle: Bundle, seed: int = 0, num_images: int = 4) -> np.ndarray:
    result = generate(
        bundle, Request("a 3d red apple on a blue background", num_images=num_images, seed=seed)
    )
    return np.stack([np.asarray(image) for image in result.images])


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v for part, net in bundle.parts.items() for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize(
    "few",
    [
        pytest.param("nano_8step_lora", marks=pytest.mark.slow),
        pytest.param("nano_4step_lora", marks=pytest.mark.slow),
        "nano_2step_lora",
    ],
)
def test_fused_and_not_fused_are_the_same_picture(
    few: str, base: Bundle, styles: list[str]
) -> None:
    stack = [few, *styles]
    merged, beside, fused = (
        load_with_loras("nano", stack),
        LoraCache(base).apply(stack),
        LoraCache(base, fused=True).apply(stack),
    )
    assert merged.contract == beside.contract == fused.contract
    assert merged.contract.name == f"nano-{few[5]}step+ink:0.8+wool:-0.5"
    assert torch.equal(latents(merged), latents(fused))
    # 1.2e-5 was measured over 16 pictures, and up to 4e-6 between one picture and 16 at a time of
    # one network: sums
    # in another order. A value that lies between two levels may then round the other way, 1 to 3 in
    # 100,000.
    torch.testing.assert_close(latents(beside), latents(merged), atol=4e-5, rtol=0)
    apart = np.abs(pixels(beside).astype(int) - pixels(merged))
    assert apart.max() <= 1 and (apart > 0).mean() < 2e-4
    plain = LoraCache(base).apply([few])
    assert (latents(plain) - latents(merged)).abs().mean() > 0.01
    assert (
        plain.conditioning(["a"], 64, 64).text - merged.conditioning(["a"], 64, 64).text
    ).abs().mean() > 0.01


@pytest.mark.slow
def test_without_rounding_they_are_the_same_in_every_pixel(styles: list[str]) -> None:
    exact = load_bundle("nano")
    for network in exact.parts.values():
        network.double()
    beside, fused = (
        LoraCache(exact, fused=fused).apply(["nano_4step_lora", *styles]) for fused in (False, True)
    )
    assert np.array_equal(pixels(beside), pixels(fused))


def test_it_is_what_diffusers_makes_of_the_same_stack(styles: list[str], base: Bundle) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        find_model("nano"), torch_dtype=torch.float32
    )
    for style, name in zip(styles, ("ink", "wool"), strict=True):
        pipeline.load_lora_weights(style.rpartition(":")[0], adapter_name=name)
    pipeline.set_adapters(["ink", "wool"], [0.8, -0.5])
    patched, x, t = (
        LoraCache(base).apply(styles),
        torch.randn(2, 4, 16, 16),
        torch.tensor([999, 250]),
    )
    conditioning = patched.conditioning(["a red fox", "a blue car"], 64, 64)
    # Of the pooled embedding it leaves the LoRA on the last projection out, and only says so.
    text, *_ = pipeline.encode_prompt(
        ["a red fox", "a blue car"], do_classifier_free_guidance=False
    )
    torch.testing.assert_close(conditioning.text, text, atol=1e-5, rtol=1e-5)
    added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
    ours, theirs = (
        net(x, t, conditioning.text, added_cond_kwargs=added).sample
        for net in (patched.parts["unet"], pipeline.unet)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_the_model_stays_as_it_was(fused: bool, styles: list[str]) -> None:
    base = load_bundle("nano", steps=2)
    before, picture = {k: v.clone() for k, v in weights(base).items()}, pixels(base)
    cache = LoraCache(base, fused=fused)
    patched = cache.apply(styles)
    assert not np.array_equal(pixels(patched), picture)
    after = weights(base)
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert np.array_equal(pixels(base), picture) and np.array_equal(
        pixels(cache.apply([])), picture
    )
    held = {v.data_ptr() for v in after.values()}
    assert all(v.data_ptr() in held for v in weights(patched).values()) != fused


def test_a_stack_seen_before_is_not_read_again(
    base: Bundle, styles: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "felt.safetensors"
    shutil.copy(styles[0].rpartition(":")[0], path)
    cache = LoraCache(base)
    patched = cache.apply([f"{path}:0.5"])
    path.unlink()
    assert cache.apply([f"{path}:0.5"]) is patched
    with pytest.raises(ModelError, match="does not exist"):
        cache.apply([str(path)])


@pytest.mark.slow
def test_requests_in_different_stacks_do_not_disturb_each_other(
    base: Bundle, styles: list[str]
) -> None:
    stacks = [["nano_2step_lora", styles[0]], ["nano_4step_lora", styles[1]], ["nano_2step_lora"]]
    cache, jobs = (
        LoraCache(base, num_kept=2),
        [(stack, seed) for seed in range(2) for stack in stacks],
    )
    alone = [pixels(LoraCache(base).apply(stack), seed, 1) for stack, seed in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: pixels(cache.apply(job[0]), job[1], 1), jobs * 2))
    assert all(np.array_equal(a, b) for a, b in zip(alone * 2, together, strict=True))


@pytest.mark.slow
def test_in_16_bits_it_is_near(styles: list[str]) -> None:
    half = load_bundle("nano")
    for network in half.parts.values():
        network.bfloat16()
    beside, fused = (
        LoraCache(half, fused=fused).apply(["nano_4step_lora", *styles]) for fused in (False, True)
    )
    exact = latents(load_with_loras("nano", ["nano_4step_lora", *styles]))
    errors = [(latents(patched) - exact).norm() / exact.norm() for patched in (beside, fused)]
    assert max(errors) < 0.02 and errors[0] < 1.2 * errors[1]  # 0.0096 and 0.0100 were measured


def test_contracts_are_checked_as_when_loras_are_merged(
    styles: list[str], base: Bundle, tmp_path: Path
) -> None:
    assert (
        LoraCache(base).apply([*styles, "nano_4step_lora:0.9"]).contract.name
        == "nano-4step:0.9+ink:0.8+wool:-0.5"
    )
    student = LoraCache(load_bundle("nano", steps=2))
    with pytest.raises(ContractError, match="it would be distilled twice"):
        student.apply(["nano_4step_lora"])
    assert student.apply(styles).contract == replace(
        student.bundle.contract, name="nano-2step+ink:0.8+wool:-0.5"
    )
    with pytest.raises(ContractError, match="is one of 4 steps already"):
        LoraCache(base).apply(["nano_4step_lora", "nano_2step_lora"])
    save_file(
        {"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(1)},
        tmp_path / "flux.safetensors",
    )
    with pytest.raises(LoraError, match="is a LoRA for Flux"):
        LoraCache(base).apply([str(tmp_path / "flux.safetensors")])
    with pytest.raises(ModelError, match="is a model folder"):
        LoraCache(base).apply([str(find_model("nano"))])
