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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twostep.contract import VariancePreservingSpec
from twostep.formats import read_contracts
from twostep.formats.contracts import SDXL as CONTRACT_OF_SDXL
from twostep.formats.header import read_header
from twostep.formats.ldm_names import unet_names
from twostep.formats.locate import SDXL_BASE, SDXL_CONFIGS, ModelError, find_model, hub_id
from twostep.formats.single_file import find_single_file, read_tensors
from twostep.formats.single_header import CLIP_G, CLIP_L, UNET, VAE
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sdxl_networks import hollow_networks
from twostep.networks.control import load_control
from twostep.pretrain.model import random_bundle
from twostep.text.vocabulary import clip_tokenizer

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
    loaded = load_bundle(single)
    assert loaded.contract.schedule == VariancePreservingSpec(zero_snr=True)
    assert loaded.denoiser.schedule.alphas[-1] == 2**-12
    write_single_file(bundle, single, ztsnr=torch.zeros(0))
    with pytest.raises(ModelError, match=r"zero SNR.*it lacks the mark v_pred"):
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


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks the hub fails."""

    def asked(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the hub was asked: {arguments}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)


def test_an_inpainting_checkpoint_takes_its_channels_from_its_weights(
    bundle: Bundle, tmp_path: Path, no_hub: None
) -> None:
    unet = UNet2DConditionModel.from_config(
        {**bundle.denoiser.network.config, "in_channels": 9}
    ).eval()
    inpainting = replace(bundle, denoiser=bundle.denoiser.with_network(unet))
    write_single_file(inpainting, tmp_path / "mine.safetensors")
    single = find_single_file(read_header(tmp_path / "mine.safetensors"))
    assert single.config("unet")["in_channels"] == 9 and single.folder == SDXL_CONFIGS
    assemble(inpainting).save_pretrained(tmp_path / "mine")
    loaded = load_bundle(tmp_path / "mine.safetensors")
    assert loaded.is_inpainting and loaded.contract.role == "teacher"
    own, read = unet.conv_in.weight, loaded.denoiser.network.conv_in.weight
    torch.testing.assert_close(read, own.half().float())


def test_without_configs_beside_it_they_are_sdxl_s_own_and_nothing_is_fetched(
    single: Path, tmp_path: Path, no_hub: None
) -> None:
    """nano is smaller, and told so; contract and networks of SDXL itself need the package alone."""
    (tmp_path / "mine").rename(tmp_path / "other")
    with pytest.raises(ModelError, match=r"are those of SDXL itself; .* in the folder .*mine"):
        load_bundle(single)
    (contract,) = read_contracts(single)
    assert (contract.sizes[0], contract.guidance) == ((1024, 1024), 6.0)
    assert contract.sizes == CONTRACT_OF_SDXL.sizes
    assert contract.schedule == VariancePreservingSpec()


def test_the_configs_in_the_package_are_those_of_sdxl(no_hub: None) -> None:
    """Parameters by part; those of the text encoders together are 817,720,320 in 2.6 B + 0.8 B."""
    networks = hollow_networks(SDXL_BASE)
    counts = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks.items()
    }
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert len(unet_names(networks["unet"].state_dict())) == 1680


def test_the_vocabulary_in_the_package_is_clip_s() -> None:
    """Numbers as CLIP's own tokenizer gives them, for both of SDXL's encoders."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    assert tokenizer("A Photo of a cat!!").input_ids == [
        49406, 320, 1125, 539, 320, 2368, 748, 49407
    ]  # fmt: skip
    assert tokenizer("caf\u00e9 \u65e5\u672c it's 1234").input_ids == [
        49406, 15304, 39121, 19277, 361, 585, 568, 272, 273, 274, 275, 49407
    ]  # fmt: skip
    assert tokenizer("", padding="max_length").input_ids == [49406, *[49407] * 76]
    assert clip_tokenizer("!")("", padding="max_length").input_ids == [49406, 49407, *[0] * 75]


def test_a_path_that_is_not_there_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    """Whatever can be a path is one; somebody else's model of that name must not be drawn with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = ("runs/a", "./a", "../a", "~/a", "/no/a", "a/b/c", "x/a.safetensors", "x/a.CKPT")
    for name in names:
        assert hub_id(name) is None
        with pytest.raises(ModelError, match="does not exist"):
            find_model(name)
        with pytest.raises(ModelError, match="is no folder of a network"):
            load_control(name, load_bundle("nano", outline=True).denoiser.network, 4)
    with pytest.raises(ModelError, match=r"in the folder runs here \(the hub's is hf:runs/a\)"):
        find_model("runs/a")
    assert hub_id(Path("owner/name")) is None
    assert hub_id("owner/name") == hub_id("hf:owner/name") == "owner/name"
    assert hub_id("hf:runs/a") == "runs/a"
    with pytest.raises(AssertionError, match="the hub was asked"):
        find_model("hf:runs/a")


def test_what_is_converted_is_read_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    halves = {f"w{i}": torch.randn(8, 4, generator=generator).half() for i in range(5)}
    tensors = {**halves, "single": torch.ones(3), "ids": torch.arange(4)}
    path = tmp_path / "weights.safetensors"
    save_file(tensors, path)
    opened: list[Path] = []

    def counted(file: Path, framework: str) -> object:
        opened.append(file)
        return safe_open(file, framework)

    monkeypatch.setattr("twostep.formats.single_file.safe_open", counted)
    monkeypatch.setattr("twostep.formats.single_file._BYTES_AT_ONCE", 2 * 8 * 4 * 2)
    as_they_are = read_tensors(path, tensors)
    assert len(opened) == 1
    converted = read_tensors(path, tensors, torch.float32)
    assert len(opened) == 1 + 3  # two halves at a time, and the rest
    assert list(converted) == list(as_they_are) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(as_they_are[name], tensor) and as_they_are[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor.float() if name in halves else tensor)
    assert converted["w0"].dtype == torch.float32 and converted["ids"].dtype == torch.int64
