"""Tiny decoders as networks: the same numbers as diffusers' class, on the right latents."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file

from tests.decoders import taesd_weights
from twostep.contract import EdmSpec
from twostep.formats.locate import ModelError
from twostep.formats.tiny_decoder import DECODER_FILE, DecoderNote, TinyLayout, find_decoder
from twostep.media.codec import FULL, TINY, TinyDecoder
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.models.tiny_decoder import (
    DecoderChoices,
    build_decoder,
    load_decoder,
    with_decoder,
    write_decoder,
    write_for_diffusers,
)

TAESD = TinyLayout(latent_channels=4, width=64, blocks=(3, 3, 3, 1))


@pytest.fixture(scope="module")
def nano() -> Bundle:
    return load_bundle("nano", steps=2)


@pytest.fixture(scope="module")
def taesd() -> AutoencoderTiny:
    """diffusers' class at TAESD's size with random weights."""
    torch.manual_seed(0)
    return AutoencoderTiny().eval().requires_grad_(False)


def small_kl(**config: object) -> AutoencoderKL:
    torch.manual_seed(1)
    levels = 4
    return AutoencoderKL(
        block_out_channels=(8,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, latent_channels=4, norm_num_groups=8,
        scaling_factor=0.13025, **config,
    ).eval().requires_grad_(False)  # fmt: skip


def test_taesds_own_file_and_that_of_diffusers_decode_as_diffusers_class(
    taesd: AutoencoderTiny, tmp_path: Path
) -> None:
    save_file(taesd_weights(taesd), tmp_path / "taesdxl_decoder.safetensors")
    taesd.save_pretrained(tmp_path / "diffusers")
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    expected = taesd.decode(latents).sample
    for name in ("taesdxl_decoder.safetensors", "diffusers"):
        tiny = load_decoder(find_decoder(str(tmp_path / name)))
        torch.testing.assert_close(tiny.network(latents), expected, rtol=1e-5, atol=1e-5)


def test_latents_reach_it_as_diffusers_pipelines_hand_them_over(taesd: AutoencoderTiny) -> None:
    """z times the scaling factor: of SDXL what the UNet works on; Playground's are shifted too."""
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = small_kl()
    codec = ImageCodec(vae, tiny=TinyDecoder(taesd.decoder), decoder=TINY)
    expected = taesd.decode(latents).sample.clamp(-1, 1)
    torch.testing.assert_close(codec.decode(latents), expected, rtol=1e-4, atol=1e-4)
    mean, std = [0.5, -1.0, 0.2, 0.0], [2.0, 3.0, 1.0, 4.0]
    shifted = ImageCodec(
        small_kl(latents_mean=mean, latents_std=std),
        deviation=EdmSpec().sigma_data,
        tiny=TinyDecoder(taesd.decoder),
        decoder=TINY,
    )
    columns = [torch.tensor(each).view(1, -1, 1, 1) for each in (mean, std)]
    z = latents * columns[1] / (0.13025 / EdmSpec().sigma_data) + columns[0]
    expected = taesd.decode(z * 0.13025).sample.clamp(-1, 1)
    torch.testing.assert_close(shifted.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_is_what_diffusers_and_we_load(nano: Bundle, tmp_path: Path) -> None:
    layout = TinyLayout(4, 8, (1, 0, 1))
    network = build_decoder(layout).eval()
    write_decoder(network, {"a": "b"}, tmp_path / DECODER_FILE)
    write_for_diffusers(network, layout, nano.codec.vae, {}, tmp_path / "diffusers")
    halved = copy.deepcopy(network).half().float()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = load_decoder(find_decoder(str(tmp_path / DECODER_FILE)))
    assert own.metadata == {"a": "b"}
    whole = AutoencoderTiny.from_pretrained(tmp_path / "diffusers")
    expected = halved(latents)
    torch.testing.assert_close(own.network(latents), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.decode(latents).sample, expected, rtol=1e-5, atol=1e-5)
    # The encoder is the autoencoder's own.
    pictures = nano.codec.smooth_pictures()
    expected = nano.codec.vae.encode(pictures).latents
    torch.testing.assert_close(whole.encode(pictures).latents, expected, rtol=1e-2, atol=1e-2)


def test_the_decoder_of_a_model_travels_with_it(nano: Bundle, tmp_path: Path) -> None:
    tiny = TinyDecoder(build_decoder(TinyLayout(4, 8, (1, 0, 0))), metadata={"a": "b"})
    bundle = replace(nano, codec=replace(nano.codec, tiny=tiny), contract=load_bundle().contract)
    save_bundle(bundle, tmp_path / "model")
    loaded = load_bundle(tmp_path / "model")
    assert loaded.codec.tiny is not None and loaded.codec.tiny.metadata == {"a": "b"}
    assert loaded.codec.decoder == FULL
    before = len(nano.networks) - (nano.codec.tiny is not None)
    assert len(loaded.networks) == before + 1
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        loaded.codec.preview(latents), loaded.codec.decode_tiny(latents).clamp(-1, 1)
    )


def test_previews_are_of_at_most_512_pixels() -> None:
    vae = small_kl()
    codec = ImageCodec(vae, tiny=TinyDecoder(build_decoder(TinyLayout(4, 4, (0, 0, 0, 0)))))
    assert codec.preview(torch.zeros(1, 4, 96, 48)).shape == (1, 3, 384, 192)


def with_own_vae(nano: Bundle, tmp_path: Path, change=lambda weights: None) -> Path:
    """nano's own decoder as a file, which decodes its latents as well as can be."""
    weights = taesd_weights(nano.codec.vae)
    change(weights)
    path = tmp_path / "own.safetensors"
    save_file(weights, path)
    return path


def test_a_file_of_the_same_latents_is_taken_and_one_of_others_refused(
    nano: Bundle, tmp_path: Path
) -> None:
    codec = with_decoder(nano.codec, str(with_own_vae(nano, tmp_path)), nano.contract)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(codec.decode(latents), nano.codec.decode(latents))

    def other_latents(weights: dict[str, torch.Tensor]) -> None:
        weights["1.weight"] = weights["1.weight"][:, [2, 0, 3, 1]].contiguous()

    path = with_own_vae(nano, tmp_path, other_latents)
    with pytest.raises(ModelError, match=r"decodes other latents than those of nano: it shows"):
        with_decoder(nano.codec, str(path), nano.contract)


@pytest.mark.parametrize(
    ("layout", "family", "message"),
    [
        (TinyLayout(16, 8, (1, 0, 0)), "sdxl", "16 channels, and those of nano have 4"),
        (TinyLayout(4, 8, (1, 0, 0, 0)), "sdxl", "makes 8 pixels a side .* nano has 4"),
        (TinyLayout(4, 8, (1, 0, 0)), "waves", "for models of the family waves.* is of sdxl"),
    ],
)
def test_a_decoder_of_another_layout_or_family_is_refused(
    layout: TinyLayout, family: str, message: str, nano: Bundle, tmp_path: Path
) -> None:
    note = DecoderNote(family, "other", "mine", "0", 30.0)
    path = tmp_path / "x.safetensors"
    write_decoder(build_decoder(layout), note.to_metadata(), path)
    with pytest.raises(ModelError, match=message):
        with_decoder(nano.codec, str(path), nano.contract)


def test_damaged_weights_and_a_missing_decoder_are_told(nano: Bundle, tmp_path: Path) -> None:
    network = build_decoder(TinyLayout(4, 8, (1, 0, 0)))
    with torch.no_grad():
        network.layers[0].bias[0] = float("nan")
    write_decoder(network, {}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"holds values that are no numbers, in 1.bias"):
        with_decoder(nano.codec, str(tmp_path / "x.safetensors"), nano.contract)
    without = replace(nano.codec, tiny=None)
    with pytest.raises(
        ModelError, match=r"nano has no tiny decoder. Make one with `twostep distill"
    ):
        with_decoder(without, TINY, nano.contract)


def test_a_choice_is_made_once_and_shares_all_else(nano: Bundle, tmp_path: Path) -> None:
    path = str(with_own_vae(nano, tmp_path))
    choices = DecoderChoices()
    assert choices.apply(nano, FULL) is nano
    chosen = choices.apply(nano, path)
    assert choices.apply(nano, path) is chosen
    assert chosen.denoiser is nano.denoiser and chosen.codec.vae is nano.codec.vae
    # Another stack of LoRAs has the same codec, whose decoder is not read again.
    other = choices.apply(replace(nano), path)
    assert other is not chosen and other.codec is chosen.codec
