"""The one sampler: it is the flow of `diffusion` under guidance, whatever the batch."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from twostep.diffusion import initial_noise, sample
from twostep.diffusion.samplers import SamplerError
from twostep.models.bundle import Bundle
from twostep.models.sampling import (
    Guided,
    decode,
    draw_noise,
    encode_prompts,
    sample_latents,
    sample_prompts,
    sampling_times,
)
from twostep.pretrain.model import random_bundle

PROMPTS = ["a red fox", "a blue car"]
SIZE = (64, 64)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return random_bundle()


def test_it_is_the_flow_under_guidance(bundle: Bundle) -> None:
    guided = encode_prompts(bundle, PROMPTS, SIZE, negative_prompt="grey", scale=3.0)
    drawn = sample_prompts(bundle, guided, [7, 8], SIZE, steps=2)
    noise = torch.stack([initial_noise(seed, bundle.latent_shape(*SIZE)) for seed in (7, 8)])
    assert torch.equal(noise, draw_noise([7, 8], bundle.latent_shape(*SIZE)))
    positive = bundle.conditioning(PROMPTS, *SIZE)
    negative = bundle.conditioning(["grey"], *SIZE).expand(2)
    with torch.no_grad():
        denoise = bundle.denoiser.with_guidance(positive, negative, 3.0)
        expected = sample(denoise, noise, 2, bundle.denoiser.schedule)
    # The prompts are encoded together in the one, apart in the other.
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=5e-4)


def test_without_guidance_nothing_is_avoided(bundle: Bundle) -> None:
    guided = encode_prompts(bundle, PROMPTS, SIZE, scale=1.0)
    assert guided.negative is None
    assert len(guided) == 2
    assert encode_prompts(bundle, PROMPTS, SIZE).scale == bundle.contract.guidance


def test_a_batch_is_cut_and_joined_without_a_difference(bundle: Bundle) -> None:
    guided = encode_prompts(bundle, PROMPTS, SIZE, scale=2.0)
    whole = sample_prompts(bundle, guided, [1, 2], SIZE, steps=2)
    second = sample_prompts(bundle, guided[1:], [2], SIZE, steps=2)
    # A batch of one and one of two are rounded apart.
    torch.testing.assert_close(second, whole[1:], rtol=1e-4, atol=5e-4)
    joined = Guided.cat([guided[:1], guided[1:]])
    assert torch.equal(joined.positive.text, guided.positive.text)
    assert joined.negative is not None
    assert len(joined.negative) == 2
    assert len(guided[:1].expand(3)) == 3
    pictures = decode(bundle, whole)
    torch.testing.assert_close(decode(bundle, whole, at_once=1), pictures)


def test_times_may_begin_anywhere_and_known_parts_are_kept(bundle: Bundle) -> None:
    guided = encode_prompts(bundle, PROMPTS[:1], SIZE, scale=1.0)
    x = draw_noise([3], bundle.latent_shape(*SIZE))
    times: list[float] = []

    def keep(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        times.append(s[0].item())
        return torch.zeros_like(x)

    with torch.no_grad():
        kept = sample_latents(bundle.denoiser, guided, x, (500, 250, 0), [3], keep=keep)
    assert times == [250, 0]
    assert not kept.any()


def test_the_contract_chooses_the_times(bundle: Bundle) -> None:
    schedule = bundle.denoiser.schedule
    usual = replace(
        bundle.contract, role="student", steps=4, guidance=1.0, trained_times=(1000, 500)
    )
    other = replace(usual, sampling_times=(1000, 760, 500, 260))
    assert sampling_times(usual, schedule) == (1000, 750, 500, 250, 0)
    assert sampling_times(usual, schedule, start=750) == (750, 500, 250, 0)
    assert sampling_times(other, schedule) == (1000, 760, 500, 260, 0)
    assert sampling_times(other, schedule, start=740) == (740, 500, 260, 0)
    assert sampling_times(bundle.contract, schedule, steps=2) == (1000, 500, 0)
    guided = encode_prompts(bundle, PROMPTS[:1], SIZE, scale=1.0)
    asked: list[float] = []
    call = bundle.denoiser.backbone.network.forward

    def forward(x: torch.Tensor, time: torch.Tensor, *args: object, **options: object) -> object:
        asked.extend(time.tolist())
        return call(x, time, *args, **options)

    with patch.object(bundle.denoiser.backbone.network, "forward", forward):
        sample_prompts(replace(bundle, contract=other), guided, [3], SIZE)
    assert asked == [999, 759, 499, 259]


def test_the_contract_chooses_the_sampler(bundle: Bundle) -> None:
    guided = encode_prompts(bundle, PROMPTS[:1], SIZE, scale=1.0)
    euler = sample_prompts(bundle, guided, [3], SIZE, steps=2)
    renoising = replace(bundle, contract=replace(bundle.contract, sampler="renoise"))
    fresh = sample_prompts(renoising, guided, [3], SIZE, steps=2)
    assert not torch.equal(fresh, euler)
    assert torch.equal(fresh, sample_prompts(renoising, guided, [3], SIZE, steps=2))
    with pytest.raises(SamplerError, match="'heun' is not known"):
        sample_prompts(bundle, guided, [3], SIZE, sampler="heun")
