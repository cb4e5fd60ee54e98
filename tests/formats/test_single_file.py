"""Whole checkpoints in one file: every name as the peers have it, every weight accounted for,
anything else told.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from twostep.formats import read_contracts
from twostep.formats.ldm_names import CLIP_G, CLIP_L, UNET, VAE, unet_names
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble, with_sdxl_vae, write_single_file

SDXL = Path(__file__).parents[2] / "benchmarks" / "sdxl_unet.json"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    """A nano bundle with the kind of autoencoder that SDXL has."""
    return with_sdxl_vae(random_bundle(), layers_per_block=2)


@pytest.fixture
def single(bundle: Bundle, tmp_path: Path) -> Path:
    """The file, and beside it the folder of its configs, without any weights."""
    assemble(bundle).save_pretrained(tmp_path / "mine")
    for path in tmp_path.glob("mine/*/*.safetensors"):
        path.unlink()
    write_single_file(bundle, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def test_it_loads_and_computes_the_same(single: Path, bundle: Bundle) -> None:
    loaded = load_bundle(single)
    assert (loaded.contract.name, loaded.contract.role, loaded.contract.prediction_type) == (
        "mine",
        "teacher",
        "eps",
    )
    half = {"atol": 5e-3, "rtol": 5e-3}
    prompts = ["a red fox", ""]
    ours, theirs = loaded.conditioning(prompts, 64, 64), bundle.conditioning(prompts, 64, 64)
    torch.testing.assert_close(ours.text, theirs.text, **half)
    torch.testing.assert_close(ours.pooled, theirs.pooled, **half)
    x, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1000, 300]),
    )
    torch.testing.assert_close(
        loaded.denoiser(x, t, theirs).eps, bundle.denoiser(x, t, theirs).eps, **half
    )
    torch.testing.assert_close(loaded.codec.decode(x), bundle.codec.decode(x), **half)


def test_names_are_those_that_diffusers_reads(single: Path, bundle: Bundle) -> None:
    """Its converters make of the file what was written into it."""
    checkpoint = load_file(single)
    for kind, network in (
        (convert_ldm_unet_checkpoint, bundle.denoiser.network),
        (convert_ldm_vae_checkpoint, bundle.codec.vae),
    ):
        converted, own = kind(dict(checkpoint), network.config), network.state_dict()
        assert set(converted) == set(own)
        for key, value in own.items():
            torch.testing.assert_close(
                converted[key].flatten(), value.half().flatten(), atol=0, rtol=0
            )
    second = bundle.text.encoders[1]
    converted = convert_open_clip_checkpoint(second, dict(checkpoint), prefix=CLIP_G)
    own = second.state_dict()
    kept = {key: value for key, value in converted.items() if key in own}
    assert len(kept) > 20
    for key, value in kept.items():
        torch.testing.assert_close(value, own[key].half(), atol=0, rtol=0)


def test_every_weight_of_sdxl_has_one_name() -> None:
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads(SDXL.read_text()))
    names = unet_names(network.state_dict())
    assert len(set(names.values())) == len(names) == 1680
    assert names["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.2.conv.weight"
    assert (
        names["down_blocks.2.resnets.0.conv_shortcut.bias"]
        == "input_blocks.7.0.skip_connection.bias"
    )


def test_it_may_say_what_it_predicts(single: Path, bundle: Bundle) -> None:
    write_single_file(bundle, single, v_pred=torch.zeros(0))
    assert read_contracts(single)[0].prediction_type == "v"
    write_single_file(bundle, single, {"modelspec.prediction_type": "v"})
    assert load_bundle(single).denoiser.prediction_type == "v"
    write_single_file(bundle, single, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    with pytest.raises(ModelError, match="zero-SNR"):
        load_bundle(single)


def change(path: Path, drop: str | None = None, **more: torch.Tensor) -> None:
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if key != drop} | more, path)


def test_missing_foreign_and_misshapen_weights_are_told(single: Path) -> None:
    whole = single.read_bytes()
    change(single, **{f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(3)})
    load_bundle(single)
    change(single, drop=f"{VAE}decoder.conv_in.weight")
    with pytest.raises(
        ModelError,
        match=r"first_stage_model.*: 1 weights are missing or foreign, as decoder.conv_in",
    ):
        load_bundle(single)
    single.write_bytes(whole)
    change(single, **{f"{UNET}input_blocks.77.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"foreign, as input_blocks\.77"):
        load_bundle(single)
    single.write_bytes(whole)
    change(single, **{f"{UNET}input_blocks.0.0.weight": torch.zeros(48, 9, 3, 3)})
    with pytest.raises(ModelError, match=r"other sizes than its config: conv_in"):
        load_bundle(single)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("conditioner.embedders.0.model.ln_final.weight", "for the SDXL refiner"),
        ("cond_stage_model.transformer.text_model.x", "for Stable Diffusion 1"),
        ("cond_stage_model.model.ln_final.weight", "for Stable Diffusion 2"),
        ("model.diffusion_model.double_blocks.0.x", "a transformer alone for Flux"),
        ("lora_unet_input_blocks_4.lora_up.weight", "a LoRA"),
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            "a UNet alone: it has no first_stage_model",
        ),
        ("something.else", "no model"),
    ],
)
def test_what_else_a_file_may_be_is_told(tmp_path: Path, key: str, message: str) -> None:
    save_file({key: torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        load_bundle(tmp_path / "x.safetensors")


def test_an_inpainting_checkpoint_takes_the_configs_of_sdxl_s_own(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = UNet2DConditionModel.from_config(
        {**bundle.denoiser.network.config, "in_channels": 9}
    ).eval()
    inpainting = replace(bundle, denoiser=bundle.denoiser.with_network(unet))
    write_single_file(inpainting, tmp_path / "mine.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"diffusers/stable-diffusion-xl-1\.0-inpainting-0\.1 is neither"
    ):
        load_bundle(tmp_path / "mine.safetensors")
    assemble(inpainting).save_pretrained(tmp_path / "mine")
    loaded = load_bundle(tmp_path / "mine.safetensors")
    assert loaded.is_inpainting and loaded.contract.role == "teacher"
    own, read = unet.conv_in.weight, loaded.denoiser.network.conv_in.weight
    torch.testing.assert_close(read, own.half().float())


def test_without_configs_beside_it_those_of_sdxl_are_asked_for(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").rename(tmp_path / "other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"stabilityai/stable-diffusion-xl-base-1\.0 is neither"):
        load_bundle(single)
    cached = tmp_path / "hub" / "models--stabilityai--stable-diffusion-xl-base-1.0"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123")
    (cached / "snapshots").mkdir()
    (tmp_path / "other").rename(cached / "snapshots" / "0123")
    assert load_bundle(single).contract.name == "mine"
