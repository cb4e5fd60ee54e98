"""What a file is, by its header alone: real names and shapes of the full size, and files that are
none.
"""

import json
import pickle
import time
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file

from twostep.formats.header import read_header
from twostep.formats.identify import kind_of, summary
from twostep.formats.ldm_names import unet_names
from twostep.formats.locate import ModelError, find_model
from twostep.formats.single_header import UNET

SDXL = json.loads((Path(__file__).parents[2] / "benchmarks" / "sdxl_unet.json").read_text())
ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
MOTION = "unet.up_blocks.0.motion_modules.1.transformer_blocks.0"
ANIMATEDIFF = (
    "up_blocks.0.motion_modules.1.temporal_transformer.transformer_blocks.0.attention_blocks.0"
)
ENCODERS = {"conditioner.embedders.0.transformer.x": (1,), "conditioner.embedders.1.model.x": (1,)}


def hollow(
    path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None
) -> Path:
    """Write a file that has these weights by its header, and on disk a hole in their place."""
    header, end = {"__metadata__": metadata or {}}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def unet_shapes(**changes: object) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {
            k: tuple(v.shape)
            for k, v in UNet2DConditionModel.from_config(SDXL | changes).state_dict().items()
        }


def old(shapes: dict[str, tuple[int, ...]], prefix: str = UNET) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shapes[key] for key, name in unet_names(shapes).items()}


def test_a_whole_checkpoint_of_five_gigabytes_is_told_at_once(tmp_path: Path) -> None:
    shapes = (
        old(unet_shapes()) | {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)} | ENCODERS
    )
    path = hollow(tmp_path / "big.safetensors", shapes, {"modelspec.prediction_type": "epsilon"})
    assert path.stat().st_size > 5e9
    start = time.perf_counter()
    described = summary(read_header(path))
    assert time.perf_counter() - start < 0.5
    assert described["is"] == "a whole checkpoint for SDXL"
    assert (described["names"], described["predicts"]) == ("latent diffusion", "epsilon")
    assert described["weights"].startswith("1,683 tensors, 2,567,4")
    assert described["weights"].endswith("F16")
    assert "InvokeAI" in described["read by"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "a UNet alone for SDXL"),
        ({"in_channels": 9}, "a UNet alone for SDXL, inpainting (9 channels)"),
        ({"in_channels": 8}, "a UNet alone for SDXL, editing (8 channels)"),
        ({"cross_attention_dim": 768}, "a UNet alone for Stable Diffusion 1"),
        ({"cross_attention_dim": 1024}, "a UNet alone for Stable Diffusion 2"),
        ({"cross_attention_dim": 1280}, "a UNet alone for the SDXL refiner"),
        ({"cross_attention_dim": 160}, "a UNet alone for SDXL's classes, in another size"),
    ],
)
def test_unets_are_told_by_their_shapes(
    tmp_path: Path, changes: dict[str, int], expected: str
) -> None:
    shapes = unet_shapes(**changes)
    before = "latent diffusion"
    for named, names in ((shapes, "diffusers"), (old(shapes), before), (old(shapes, ""), before)):
        kind = kind_of(read_header(hollow(tmp_path / "unet.safetensors", named)))
        assert (str(kind), kind.names) == (expected, names)
        assert kind.readers.startswith(
            "not twostep" if "Stable" in expected or "refiner" in expected else "twostep"
        )


@pytest.mark.parametrize(
    ("shapes", "expected", "reader"),
    [
        (
            {
                "lora_unet_" + ATTENTION.replace(".", "_") + ".lora_down.weight": (8, 2048),
                "lora_unet_" + ATTENTION.replace(".", "_") + ".lora_up.weight": (640, 8),
            },
            "a LoRA for SDXL",
            "A1111",
        ),
        (
            {"lora_unet_down_blocks_1_attn2_to_k.lora_down.weight": (8, 768)},
            "a LoRA for Stable Diffusion 1",
            "not",
        ),
        (
            {
                "unet.down_blocks.1.x.attn2.to_k.lora_A.weight": (8, 2048),
                "unet.down_blocks.1.x.attn2.to_k.lora_B.weight": (640, 8),
            },
            "a LoRA for SDXL",
            "only in part",
        ),
        (
            {"unet.down_blocks.1.x.attn2.to_k.lora.down.weight": (8, 1024)},
            "a LoRA for Stable Diffusion 2",
            "not",
        ),
        (
            {"lora_te_text_model_encoder.lora_up.weight": (8, 8)},
            "a LoRA for Stable Diffusion 1 or 2",
            "not",
        ),
        ({"lora_unet_single_blocks_1_linear1.lora_up.weight": (8, 8)}, "a LoRA for Flux", "not"),
        (
            {"transformer.single_transformer_blocks.0.x.lora_A.weight": (8, 8)},
            "a LoRA for Flux",
            "not",
        ),
        (
            {"lora_unet_joint_blocks_0_x.lora_down.weight": (8, 8)},
            "a LoRA for Stable Diffusion 3",
            "not",
        ),
        ({"lora_unet_mid.hada_w1_a": (8, 8)}, "a LoHa", "twostep"),
        ({"lora_unet_mid.lokr_w1": (8, 8)}, "a LoKr", "twostep"),
        (
            {"model.diffusion_model.joint_blocks.0.x": (1,)},
            "a transformer alone for Stable Diffusion 3",
            "not",
        ),
        ({"double_blocks.0.x": (1,)}, "a transformer alone for Flux", "not"),
        (
            {
                "cond_stage_model.transformer.x": (1,),
                "first_stage_model.x": (1,),
                "model.diffusion_model.x": (1,),
            },
            "a whole checkpoint for Stable Diffusion 1",
            "not",
        ),
        (
            {"first_stage_model.x": (1,), "model.diffusion_model.x": (1,)},
            "a checkpoint without its text enc",
            "not",
        ),
        ({"text_model.encoder.x": (1,)}, "a text encoder alone", "not twostep"),
        ({"transformer.resblocks.0.x": (1,)}, "a text encoder alone", "not twostep"),
        ({"clip_g": (1, 1280), "clip_l": (1, 768)}, "a textual inversion", "not twostep"),
        (
            {"image_proj.x": (1,), "ip_adapter.1.to_k_ip.weight": (1,)},
            "an IP-Adapter",
            "not twostep",
        ),
        (
            {
                f"{MOTION}.attn1.to_q.lora_A.weight": (4, 96),
                f"{MOTION}.attn1.to_q.lora_B.weight": (96, 4),
            },
            "a LoRA for a motion module",
            "twostep, on models of clips",
        ),
        (
            {
                f"{ANIMATEDIFF}.processor.to_q_lora.down.weight": (4, 320),
                f"{ANIMATEDIFF}.processor.to_q_lora.up.weight": (320, 4),
            },
            "a LoRA for a motion module",
            "AnimateDiff",
        ),
        ({"something": (1,)}, "no model that is known here", "not twostep"),
        ({}, "a file without any weights", "not twostep"),
    ],
)
def test_other_files_are_told_by_their_names(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], expected: str, reader: str
) -> None:
    described = summary(read_header(hollow(tmp_path / "x.safetensors", shapes)))
    assert described["is"].startswith(expected)
    assert reader in described["read by"]


def test_controlnets_and_autoencoders_are_told(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SDXL)
        control, vae = (
            ControlNetModel.from_unet(unet, load_weights_from_unet=False),
            AutoencoderKL(),
        )
    for network, expected in ((control, "a ControlNet for SDXL"), (vae, "a VAE alone")):
        shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
        kind = kind_of(read_header(hollow(tmp_path / "x.safetensors", shapes)))
        assert (str(kind), kind.names) == (expected, "diffusers")


def test_ranks_and_alphas_are_told(tmp_path: Path) -> None:
    assert summary(read_header(find_model("nano_4step_lora")))["rank"] == "12"
    layer = "lora_unet_" + ATTENTION.replace(".", "_")
    shapes = {
        f"{layer}.lora_down.weight": (8, 2048),
        f"{layer}.alpha": (),
        "lora_te1_x.lora_down.weight": (4, 768),
    }
    described = summary(read_header(hollow(tmp_path / "x.safetensors", shapes)))
    assert (described["rank"], described["alpha"], described["names"]) == (
        "4, 8",
        "in the file",
        "kohya, after latent diffusion",
    )
    assert summary(
        read_header(hollow(tmp_path / "v.safetensors", old(unet_shapes()) | {"v_pred": ()}))
    )["predicts"] == ("v")


def test_what_is_no_whole_file_is_told(tmp_path: Path) -> None:
    save_file({"x": torch.ones(9)}, tmp_path / "good.safetensors")
    good, path = (tmp_path / "good.safetensors").read_bytes(), tmp_path / "x.safetensors"
    with zipfile.ZipFile(tmp_path / "zipped.ckpt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({}))
    pickled = "is a pickle.*weights_only=True.*safetensors.torch.save_file"
    for content, expected in (
        (b"", "is empty"),
        (b"tiny", "is no whole safetensors file .4 bytes"),
        (good[:-1], r"no whole safetensors file .it has \d+ of \d+ bytes"),
        (good[:20], "no whole safetensors file"),
        (good + b"more", r"it has \d+ of \d+ bytes"),
        ((1 << 40).to_bytes(8, "little") + good, "cannot have a header of 1099511627776"),
        (good[:8] + b"\xff" + good[9:], "no whole safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no whole safetensors file"),
        ((10).to_bytes(8, "little") + b'{"x": 1  }', "no whole safetensors file"),
        (pickle.dumps({"a": 1}), pickled),
        ((tmp_path / "zipped.ckpt").read_bytes(), pickled),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=expected):
            read_header(path)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ModelError, match="no whole safetensors file"):
            read_header(missing)
