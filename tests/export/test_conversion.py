"""From one form to another and back, bit for bit, on every key; at the full size by names and
shapes.
"""

import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from twostep.export.conversion import REST, convert
from twostep.formats import read_contracts
from twostep.formats.ldm_names import split
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import DIALECTS, LoraError, LowRank, merge_lora, write_lora
from twostep.formats.single_file import NAMES, PARTS, account, whole_weights
from twostep.formats.single_header import CLIP_G, CLIP_L, UNET, VAE
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sdxl_networks import hollow_networks

from ..vanilla import assemble, assert_merged_alike, fuse_into_nano, write_single_file
from .conftest import random_lora, student_contract

SDXL = Path(__file__).parents[2] / "benchmarks" / "sdxl_unet.json"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and torch.equal(a[key], b[key])
        for key in a
    )


@pytest.mark.parametrize("name", ["me/style", "me/style/ink.safetensors", "hf:me/style"])
def test_a_lora_of_the_hub_is_converted_as_its_file(
    name: str, bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the hub's cache, as `generate --lora` finds it."""
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--me--style" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    tensors, details = write_lora(random_lora(bundle), dict(bundle.parts), "peft")
    save_file(tensors, snapshot / "ink.safetensors", details)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    convert(name, "kohya", tmp_path / "hub.safetensors", base=str(folder))
    convert(snapshot / "ink.safetensors", "kohya", tmp_path / "file.safetensors", base=str(folder))
    assert same_bits(
        load_file(tmp_path / "hub.safetensors"), load_file(tmp_path / "file.safetensors")
    )


@pytest.mark.parametrize(
    "precision",
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(torch.float32, marks=pytest.mark.slow),
    ],
)
def test_a_lora_comes_back_from_every_dialect_bit_for_bit(
    precision: torch.dtype, folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    lora = {
        layer: LowRank(
            low.down.to(precision), low.up.to(precision), 3.0 if layer.endswith("conv1") else 1.5
        )
        for layer, low in random_lora(bundle).items()
    }
    carried = student_contract(bundle.contract, 4, rank=3).to_metadata() | {"mine": "stays"}
    for start, over in permutations(("kohya", "kohya-diffusers", "peft"), 2):
        first, second, third = (
            tmp_path / f"{start} {over} {number}.safetensors" for number in "123"
        )
        tensors, more = write_lora(lora, bundle.parts, start)
        save_file(tensors, first, carried | more)
        convert(str(first), over, second, base=str(folder))
        convert(str(second), start, third, base=str(folder))
        assert same_bits(load_file(first), load_file(third)), (start, over)
        assert {value.dtype for value in load_file(second).values()} == {precision}
        for path in (second, third):
            assert (carried | {"mine": "stays"}).items() <= metadata(path).items()
        assert ("lora_adapter_metadata" in metadata(second)) == (over == "peft")


def test_early_files_have_no_alpha(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    plain = {layer: LowRank(low.down, low.up, 3.0) for layer, low in random_lora(bundle).items()}
    save_file(write_lora(plain, bundle.parts, "kohya")[0], tmp_path / "plain.safetensors")
    convert(
        str(tmp_path / "plain.safetensors"),
        "early",
        tmp_path / "early.safetensors",
        base=str(folder),
    )
    early = load_file(tmp_path / "early.safetensors")
    assert len(early) == 2 * len(plain)
    assert all(
        ".lora.down." in key or ".lora.up." in key for key in early if key.startswith("unet")
    )
    assert (
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight"
        in early
    )
    convert(
        str(tmp_path / "early.safetensors"),
        "kohya",
        tmp_path / "back.safetensors",
        base=str(folder),
    )
    assert same_bits(
        load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "plain.safetensors")
    )
    save_file(
        write_lora(random_lora(bundle), bundle.parts, "kohya")[0], tmp_path / "other.safetensors"
    )
    with pytest.raises(
        LoraError, match=r"Early files have no alpha, and text_encoder.* has 1\.5 at rank 3"
    ):
        convert(
            str(tmp_path / "other.safetensors"),
            "early",
            tmp_path / "x.safetensors",
            base=str(folder),
        )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_diffusers_makes_the_same_of_every_dialect(dialect: str, tmp_path: Path) -> None:
    ours = load_bundle("nano")
    lora = random_lora(ours, alpha=3.0 if dialect == "early" else 1.5)
    tensors, more = write_lora(lora, ours.parts, dialect)
    save_file(tensors, tmp_path / "lora.safetensors", more)
    merge_lora(lora, ours.parts, weight=0.8)
    assert_merged_alike(ours, fuse_into_nano(tmp_path / "lora.safetensors", weight=0.8))


@pytest.fixture
def single(folder: Path, bundle: Bundle, tmp_path: Path) -> Path:
    """A file with all that real ones have: two precisions, keys that no network needs, metadata."""
    more = {
        f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(20)[None],
        f"{CLIP_G}logit_scale": torch.tensor(4.6, dtype=torch.float16),
        "alphas_cumprod": torch.rand(1000),
    }
    write_single_file(bundle, tmp_path / "mine.safetensors", {"modelspec.title": "mine"}, **more)
    weights = load_file(tmp_path / "mine.safetensors")
    weights |= {key: value.bfloat16() for key, value in weights.items() if key.startswith(VAE)}
    save_file(weights, tmp_path / "mine.safetensors", {"modelspec.title": "mine"})
    (tmp_path / "mine").symlink_to(folder)
    return tmp_path / "mine.safetensors"


def test_a_whole_file_comes_back_from_a_folder_bit_for_bit(
    single: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out = convert(single, "diffusers", tmp_path / "folder")
    back = convert(out, "single-file", tmp_path / "deep" / "back.safetensors")
    assert same_bits(load_file(single), load_file(back))
    assert metadata(back) == {"modelspec.title": "mine"}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*PARTS, "tokenizer", "tokenizer_2", "scheduler", "model_index.json", REST]
    )
    assert (
        load_file(out / "vae" / "diffusion_pytorch_model.safetensors")[
            "decoder.conv_in.weight"
        ].dtype
        == torch.bfloat16
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, torch_dtype=torch.float32)
    for name, network in {**bundle.parts, "vae": bundle.codec.vae}.items():
        theirs = getattr(pipeline, name).state_dict()
        precision = torch.bfloat16 if name == "vae" else torch.float16
        for key, value in network.state_dict().items():
            assert torch.equal(theirs[key], value.half().to(precision).float()), (name, key)


def test_a_folder_comes_back_from_a_whole_file_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    file = convert(folder, "single-file", tmp_path / "one.safetensors")
    (tmp_path / "one").symlink_to(folder)
    out = convert(file, "diffusers", tmp_path / "again")
    for part in PARTS:
        (path,) = (folder / part).glob("*.safetensors")
        (again,) = (out / part).glob("*.safetensors")
        before = {
            key
            if part != "text_encoder" or key.startswith("text_model.")
            else f"text_model.{key}": value
            for key, value in load_file(path).items()
        }
        assert same_bits(before, load_file(again)), part
    assert read_contracts(out)[0] == read_contracts(folder)[0]


def test_that_a_folder_predicts_v_is_in_its_file(bundle: Bundle, tmp_path: Path) -> None:
    assemble(bundle, prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    file = convert(tmp_path / "v", "single-file", tmp_path / "v.safetensors")
    assert (
        load_file(file)["v_pred"].shape == (0,) and read_contracts(file)[0].prediction_type == "v"
    )
    out = convert(file, "diffusers", tmp_path / "again")
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == (
        "v_prediction",
        "linspace",
    )
    assert read_contracts(out)[0].prediction_type == "v"
    assert json.loads((out / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert same_bits(
        load_file(convert(out, "single-file", tmp_path / "back.safetensors")), load_file(file)
    )


def test_what_a_students_file_says_goes_into_the_folder(
    single: Path, bundle: Bundle, tmp_path: Path
) -> None:
    contract = student_contract(bundle.contract, 1)
    save_file(load_file(single), single, contract.to_metadata())
    out = convert(single, "diffusers", tmp_path / "folder")
    assert read_contracts(out)[0] == contract
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == ("sample", "trailing")


def full_size(folder: Path) -> Path:
    """The configs of SDXL, as they stand on the hub."""
    text = {"vocab_size": 49408, "max_position_embeddings": 77}
    small = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, projection_dim=768, **text
    )
    large = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, projection_dim=1280, **text
    )
    small.save_pretrained(folder / "text_encoder")
    large.save_pretrained(folder / "text_encoder_2")
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
    vae |= {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    for name, config in (
        ("unet", json.loads(SDXL.read_text())),
        ("vae", vae | {"_class_name": "AutoencoderKL"}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text("{}")
    return folder


def test_at_the_full_size_every_key_goes_there_and_back(tmp_path: Path) -> None:
    networks = hollow_networks(full_size(tmp_path))
    whole = whole_weights(networks)
    counts = {part: sum(key.startswith(part) for key in whole) for part in PARTS.values()}
    # The official file has 2,515: these, CLIP's position_ids and open_clip's logit_scale.
    assert counts == {UNET: 1680, VAE: 248, CLIP_L: 196, CLIP_G: 389} and len(whole) == 2513
    assert whole[f"{CLIP_G}transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert whole[f"{CLIP_G}text_projection"].shape == (1280, 1280)
    assert whole[f"{VAE}encoder.mid.attn_1.k.weight"].shape == (512, 512, 1, 1)
    assert whole[f"{UNET}label_emb.0.0.weight"].shape == (1280, 2816)
    assert whole[f"{CLIP_L}text_model.encoder.layers.11.mlp.fc2.bias"].shape == (768,)
    for name, part in PARTS.items():
        named = {
            key.removeprefix(part): value for key, value in whole.items() if key.startswith(part)
        }
        expected = networks[name].state_dict()
        weights = account(
            split(named) if part == CLIP_G else named, expected, NAMES[part](expected), name
        )
        assert {key: value.shape for key, value in weights.items()} == {
            k: v.shape for k, v in expected.items()
        }
    for kind, name in ((convert_ldm_unet_checkpoint, "unet"), (convert_ldm_vae_checkpoint, "vae")):
        assert isinstance(networks[name], UNet2DConditionModel | AutoencoderKL)
        theirs = kind(dict(whole), networks[name].config)
        assert theirs.keys() == networks[name].state_dict().keys()


def test_what_does_not_convert_is_told(
    single: Path, folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file(write_lora(random_lora(bundle), bundle.parts, "kohya")[0], lora)
    half = load_file(lora)
    half.popitem()
    save_file(half, tmp_path / "half.safetensors")
    partly = load_file(single)
    partly.pop(f"{CLIP_G}ln_final.weight")
    save_file(partly, tmp_path / "partly.safetensors")
    (tmp_path / "partly").symlink_to(folder)
    for model, to, where, base, message in (
        (lora, "diffusers", out, None, "is a LoRA, which does not go to 'diffusers'"),
        (lora, "a1111", out, None, "a LoRA goes to peft, early, kohya-diffusers, kohya"),
        (lora, "peft", out, None, "does not say whose layers it has"),
        (lora, "peft", lora, folder, "is already there"),
        (tmp_path / "half.safetensors", "peft", out, folder, "lacks the"),
        (single, "peft", out, None, "is a whole checkpoint, which does not go to 'peft'"),
        (
            tmp_path / "partly.safetensors",
            "diffusers",
            tmp_path / "o",
            None,
            r"1 weights are missing.* ln_final\.weight",
        ),
        ("nano", "single-file", out, None, "is an AutoencoderTiny"),
    ):
        with pytest.raises(ModelError, match=message):
            convert(model, to, where, base=base and str(base))
    assert not out.exists() and not (tmp_path / "o").exists()
    again = convert(single, "diffusers", tmp_path / "damaged")
    weights = load_file(again / "unet" / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_in.weight")
    save_file(weights, again / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ModelError, match=r"unet: 1 weights are missing or foreign, as conv_in\.weight"
    ):
        convert(again, "single-file", out)
