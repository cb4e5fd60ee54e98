"""ControlNets from one file are those of their folder; what else such files may be is named."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from twostep.formats.locate import ModelError
from twostep.networks.control import BUILT_IN, load_control
from twostep.pretrain.model import random_bundle

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    return random_bundle().denoiser.network


def answer(network: ControlNetModel, unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    config = unet.config
    with torch.no_grad():
        down, middle = network(
            torch.randn(1, 4, 16, 16, generator=generator),
            torch.tensor([500]),
            torch.randn(1, 20, config.cross_attention_dim, generator=generator),
            controlnet_cond=torch.rand(1, 3, 64, 64, generator=generator),
            added_cond_kwargs={
                "text_embeds": torch.randn(1, 96, generator=generator),
                "time_ids": torch.full((1, 6), 64.0),
            },
            return_dict=False,
        )
    return torch.cat([part.flatten() for part in (*down, middle)])


def test_one_file_is_the_folder_it_came_from(unet: torch.nn.Module, tmp_path: Path) -> None:
    """The built-in one, and one without attention, whose layers its config would say."""
    shutil.copy(BUILT_IN["silhouette"] / WEIGHTS, tmp_path / "one.safetensors")
    folder = load_control("silhouette", unet, 4)
    file = load_control(str(tmp_path / "one.safetensors"), unet, 4)
    torch.testing.assert_close(answer(file, unet), answer(folder, unet))
    assert answer(file, unet).abs().max() > 1e-3
    assert load_control(str(tmp_path / "one.safetensors"), unet, 4) is file


def test_one_without_attention_is_read_off_its_names(unet: torch.nn.Module, tmp_path: Path) -> None:
    config = {
        **unet.config,
        "down_block_types": ["DownBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2D",
        "conditioning_embedding_out_channels": (16, 32, 64),
    }
    torch.manual_seed(1)
    plain = ControlNetModel.from_config(config)
    for block in (*plain.controlnet_down_blocks, plain.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.1)
    save_file(plain.state_dict(), tmp_path / "small.safetensors")
    read = load_control(str(tmp_path / "small.safetensors"), unet, 4)
    torch.testing.assert_close(answer(read, unet), answer(plain.eval(), unet))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("task_embedding", "a ControlNet-Union, which is not read here"),
        ("control_add_embedding.linear_1.weight", "a ControlNet-Union"),
        ("lora_controlnet", "a ControlNet-LoRA, which is not read here"),
        ("lllite_unet_input_blocks_4_1.down.0.weight", "a ControlNet-LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet, latent diffusion names"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet alone"),
        ("x", "no model that is known here"),
    ],
)
def test_what_else_a_file_may_be_is_named(
    unet: torch.nn.Module, tmp_path: Path, key: str, message: str
) -> None:
    tensors = {key: torch.ones(4, 4), "controlnet_cond_embedding.conv_in.weight": torch.ones(1)}
    if "Union" not in message and "LoRA" not in message:
        tensors.popitem()
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"{message}.*Expected a ControlNetModel's folder"):
        load_control(str(tmp_path / "x.safetensors"), unet, 4)


def test_a_file_for_another_model_or_with_missing_weights_says_so(
    unet: torch.nn.Module, tmp_path: Path
) -> None:
    whole = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
    weights = {key: value.clone() for key, value in whole.state_dict().items()}
    wide = {
        key: torch.zeros(*value.shape[:1], 2048) if key.endswith("attn2.to_k.weight") else value
        for key, value in weights.items()
    }
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ModelError, match="for another model: cross_attention_dim 2048, expected"):
        load_control(str(tmp_path / "wide.safetensors"), unet, 4)
    del weights["controlnet_mid_block.weight"]
    save_file(weights, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=r"1 weights are missing or foreign, as controlnet_mid"):
        load_control(str(tmp_path / "cut.safetensors"), unet, 4)
