"""Half precision that overflows is done once more in float32, and previews are near what the
decoder makes.
"""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano", steps=2)


def overflowing(kind: str, bundle: Bundle) -> ImageCodec:
    """Autoencoders whose inner values lie beyond half precision, and whose pictures do not."""
    torch.manual_seed(0)
    if kind == "tiny":
        vae = copy.deepcopy(bundle.codec.vae)
        first, last = vae.decoder.layers[0], vae.decoder.layers[-1]
        with torch.no_grad():
            first.weight.mul_(2e4), first.bias.mul_(2e4), last.weight.mul_(5e-5)
        return ImageCodec(vae.half())
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    with torch.no_grad():
        vae.post_quant_conv.weight.mul_(2e4)
        vae.quant_conv.weight.mul_(1e-3)
        vae.encoder.conv_out.weight.mul_(6e5)
    return ImageCodec(vae.half().eval().requires_grad_(False))


@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_half_precision_that_overflows_is_decoded_in_float32(kind: str, bundle: Bundle) -> None:
    codec = overflowing(kind, bundle)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 5
    raw = codec.vae.decode((latents / codec.vae.config.scaling_factor).half()).sample
    assert not raw.isfinite().all(), "the test needs an overflow"
    whole = ImageCodec(copy.deepcopy(codec.vae).float())
    assert torch.equal(codec.decode(latents), whole.decode(latents))
    assert {weight.dtype for weight in codec.vae.parameters()} == {torch.float16}


def test_encoding_that_overflows_is_done_in_float32(bundle: Bundle) -> None:
    codec = overflowing("kl", bundle)
    media = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not codec.vae.encode(media.half()).latent_dist.mean.isfinite().all(), (
        "the test needs an overflow"
    )
    whole = ImageCodec(copy.deepcopy(codec.vae).float())
    assert torch.equal(codec.encode(media), whole.encode(media))


def test_half_precision_without_overflow_stays_half(bundle: Bundle) -> None:
    codec = ImageCodec(copy.deepcopy(bundle.codec.vae).half())
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        codec.decode(latents), codec.vae.decode(latents.half()).sample.float().clamp(-1, 1)
    )


def test_a_picture_is_drawn_where_half_precision_overflows(bundle: Bundle) -> None:
    request = Request("a 3d red apple on a blue background", seed=7)
    half = generate(replace(bundle, codec=overflowing("tiny", bundle)), request).images[0]
    extremes = [high for _, high in half.getextrema()]
    assert max(extremes) > 0


def test_previews_explain_most_of_what_the_decoder_makes(bundle: Bundle) -> None:
    foreseen: list[torch.Tensor] = []
    for prompt in (
        "a 3d red apple on a blue background",
        "a flat green dog on a pink background",
        "a drawn car",
    ):
        request = Request(prompt, num_images=4)
        generate(bundle, request, on_step=lambda step: foreseen.append(step.prediction.x0))
    latents = torch.cat(foreseen)
    shown = torch.nn.functional.avg_pool2d(
        bundle.codec.decode(latents), bundle.codec.pixels_per_latent
    )
    without_tiny = replace(bundle.codec, tiny=None)
    apart = (without_tiny.preview(latents) - shown).square().mean()
    spread = (shown - shown.mean(dim=(0, 2, 3), keepdim=True)).square().mean()
    assert without_tiny.preview(latents).shape == shown.shape
    assert 1 - apart / spread > 0.7
