"""LoRA files in every dialect: each says the same, alpha stays, no key is lost, and foreign files
are told.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from twostep.formats.locate import ModelError, find_model
from twostep.formats.lora_files import LoraError, LowRank, merge_lora, read_lora, write_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.adapters import TARGETS
from twostep.pretrain.model import random_bundle

from ..vanilla import assert_merged_alike, fuse_into_nano

ROOT = Path(__file__).parents[2]
RANK, ALPHA = 3, 1.5


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


@pytest.fixture(scope="module")
def lora(bundle: Bundle) -> dict[str, LowRank]:
    """A random LoRA on every target of the UNet, and on the attention of both text encoders."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for part, network in bundle.parts.items():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(
                (*TARGETS, "q_proj", "k_proj", "v_proj", "out_proj")
            ):
                tall, wide = (
                    torch.Size((len(module.weight), RANK)),
                    torch.Size((RANK, *module.weight.shape[1:])),
                )
                tall = torch.Size((*tall, 1, 1)) if module.weight.dim() == 4 else tall
                down, up = (torch.randn(size, generator=generator) / 8 for size in (wide, tall))
                changes[f"{part}.{name}"] = LowRank(down, up, ALPHA)
    assert len(changes) > 100
    return changes


def same(a: dict[str, LowRank], b: dict[str, LowRank]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].down, b[k].down)
        and torch.equal(a[k].up, b[k].up)
        and a[k].alpha == b[k].alpha
        for k in a
    )


def with_text_model(layer: str) -> str:
    """CLIP's names as files have them, whichever transformers is installed."""
    part, _, name = layer.partition(".")
    return (
        layer if part == "unet" or name.startswith("text_model.") else f"{part}.text_model.{name}"
    )


def peft(lora: dict[str, LowRank]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {f"{with_text_model(k)}.lora_A.weight": low.down for k, low in lora.items()}
    tensors |= {f"{with_text_model(k)}.lora_B.weight": low.up for k, low in lora.items()}
    alphas = {f"{part}.lora_alpha": ALPHA for part in ("unet", "text_encoder", "text_encoder_2")}
    return tensors, {"lora_adapter_metadata": json.dumps(alphas)}


def early(lora: dict[str, LowRank]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = {f"{with_text_model(k)}.lora.down.weight": low.down for k, low in lora.items()}
    tensors |= {f"{with_text_model(k)}.lora.up.weight": low.up for k, low in lora.items()}
    return tensors | {
        f"{with_text_model(k)}.alpha": torch.tensor(low.alpha) for k, low in lora.items()
    }, {}


def kohya_after_diffusers(
    lora: dict[str, LowRank],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    starts = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors = {}
    for layer, low in lora.items():
        part, _, name = with_text_model(layer).partition(".")
        stem = f"{starts[part]}_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": low.down, f"{stem}.lora_up.weight": low.up}
        tensors[f"{stem}.alpha"] = torch.tensor(low.alpha)
    return tensors, {}


@pytest.mark.parametrize("write", [peft, early, kohya_after_diffusers])
def test_every_dialect_says_the_same(
    write, bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    tensors, metadata = write(lora)
    save_file(tensors, tmp_path / "lora.safetensors", metadata)
    assert same(read_lora(tmp_path / "lora.safetensors", bundle.parts), lora)


def test_kohya_and_back_is_exact(bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path) -> None:
    save_file(write_lora(lora, bundle.parts, "kohya")[0], tmp_path / "lora.safetensors")
    assert same(read_lora(tmp_path / "lora.safetensors", bundle.parts), lora)


def test_diffusers_makes_the_same_of_what_kohya_writes(
    lora: dict[str, LowRank], tmp_path: Path
) -> None:
    ours = load_bundle("nano")
    save_file(write_lora(lora, ours.parts, "kohya")[0], tmp_path / "lora.safetensors")
    merge_lora(lora, ours.parts, weight=0.8)
    assert_merged_alike(ours, fuse_into_nano(tmp_path / "lora.safetensors", weight=0.8))


def test_of_the_full_size_788_layers_have_names_that_all_programs_read() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((ROOT / "benchmarks" / "sdxl_unet.json").read_text())
        )
        weights = {
            f"unet.{name}": LowRank(torch.empty(64, 1), torch.empty(1, 64), 64.0)
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(TARGETS)
        }
    tensors = write_lora(weights, {"unet": unet}, "kohya")[0]
    assert len(tensors) == 3 * 788
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_3_0_op.lora_up.weight",
        "lora_unet_middle_block_1_proj_in.alpha",
        "lora_unet_output_blocks_2_2_conv.lora_down.weight",
        "lora_unet_output_blocks_0_0_skip_connection.alpha",
        "lora_unet_input_blocks_1_0_emb_layers_1.alpha",
    ):
        assert name in tensors


def test_without_an_alpha_it_is_the_rank(
    bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    tensors = {
        key: value
        for key, value in write_lora(lora, bundle.parts, "kohya")[0].items()
        if not key.endswith(".alpha")
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert {
        low.alpha for low in read_lora(tmp_path / "lora.safetensors", bundle.parts).values()
    } == {float(RANK)}
    given = read_lora(tmp_path / "lora.safetensors", bundle.parts, alpha=7.0)
    assert {low.alpha for low in given.values()} == {7.0}


def test_what_is_no_lora_for_this_model_is_told(
    bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    path, good = tmp_path / "lora.safetensors", write_lora(lora, bundle.parts, "kohya")[0]
    (unet_down,) = [
        key
        for key in good
        if key.endswith("input_blocks_3_1_transformer_blocks_0_attn2_to_k.lora_down.weight")
    ]
    doubled, twice = next(iter(peft(lora)[0].items()))
    sd1_or_2 = "is a LoRA for Stable Diffusion 1 or 2"
    for tensors, message in (
        ({}, "is empty"),
        ({"lora_te_text_model_x.lora_down.weight": torch.ones(1)}, sd1_or_2),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": torch.ones(1)}, sd1_or_2),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.ones(1)}, sd1_or_2),
        ({"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.ones(1)}, "is a LoRA for Flux"),
        (
            {"lora_unet_single_blocks_37_linear1.lora_down.weight": torch.ones(1)},
            "is a LoRA for Flux",
        ),
        ({"transformer.x.lora_A.weight": torch.ones(1)}, "is a LoRA for a transformer"),
        ({unet_down.replace("lora_down", "hada_w1_a"): torch.ones(1)}, "is a LoHa: it has"),
        (
            {**good, unet_down.replace("lora_down.weight", "dora_scale"): torch.ones(1)},
            "does not fit",
        ),
        (
            {"model.diffusion_model.x.weight": torch.ones(1)},
            "is a UNet alone: it has model.diffusion_model.x",
        ),
        ({**good, doubled: twice.clone()}, "mixes dialects"),
        ({**good, unet_down: good[unet_down] / 0}, "holds NaN or infinity for unet.down_blocks"),
        (
            {k: v for k, v in good.items() if k != unet_down},
            "lacks the down half of unet.down_blocks",
        ),
        (
            {**good, unet_down: torch.ones(RANK, 768)},
            r"\[3, 768\]. It was made for a model of another kind",
        ),
    ):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        with pytest.raises(LoraError, match=message):
            read_lora(path, bundle.parts)
    save_file(good, path, {"lora_adapter_metadata": "{half"})
    with pytest.raises(LoraError, match="lora_adapter_metadata is damaged"):
        read_lora(path, bundle.parts)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no whole safetensors file"):
        read_lora(path, bundle.parts)


def test_a_text_part_needs_text_encoders(
    bundle: Bundle, lora: dict[str, LowRank], tmp_path: Path
) -> None:
    save_file(write_lora(lora, bundle.parts, "kohya")[0], tmp_path / "lora.safetensors")
    with pytest.raises(LoraError, match="no layer of unet is called so"):
        read_lora(tmp_path / "lora.safetensors", {"unet": random_bundle().denoiser.network})


def test_early_files_of_a_lora_load_alike_through_the_package(tmp_path: Path) -> None:
    shipped = load_file(find_model("nano_4step_lora"))
    renamed = {
        k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in shipped.items()
    }
    save_file(renamed, tmp_path / "lora.safetensors")
    parts = {"unet": random_bundle().denoiser.network}
    assert same(
        read_lora(tmp_path / "lora.safetensors", parts),
        read_lora(find_model("nano_4step_lora"), parts),
    )
