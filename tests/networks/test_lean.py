"""The lean networks compute what those of diffusers and transformers do, from the same weights."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from twostep.formats.locate import SDXL_CONFIGS, read_json
from twostep.models.sdxl_networks import build_network
from twostep.networks.lean import KlAutoencoder, lean_network

UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "attention_head_dim": [1, 2],
    "block_out_channels": [16, 32],
    "cross_attention_dim": 24,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 12 + 48,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
}
"""A UNet with everything that SDXL's has, and text at its largest size too."""

KL = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "out_channels": 3,
    "scaling_factor": 0.13,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}

CLIP = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "projection_dim": 20,
    "hidden_act": "quick_gelu",
    "eos_token_id": 39,
}


def twins(known: nn.Module, config: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Return a network of a library with random weights, and the lean one with the same."""
    torch.manual_seed(0)
    for weight in known.parameters():
        nn.init.normal_(weight, std=0.2)
    lean = lean_network(config, name)
    assert lean is not None
    lean.load_state_dict(known.state_dict())
    return known.eval().requires_grad_(False), lean.eval().requires_grad_(False)


def assert_close(given: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 0.01
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6 * max(1.0, scale))


def unet_inputs(height: int, width: int) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, height, width),
        "timestep": torch.tensor([999, 250]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, 12),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 48, 3, 2, 64, 32]]),
        },
        "return_dict": False,
    }


@pytest.mark.parametrize("is_linear", [True, False])
def test_a_unet(is_linear: bool) -> None:
    config = {**UNET, "use_linear_projection": is_linear}
    known, lean = twins(UNet2DConditionModel.from_config(config), config, "unet")
    inputs = unet_inputs(8, 6)
    assert_close(lean(**inputs)[0], known(**inputs)[0])


def test_a_unet_with_controls_at_sizes_that_cannot_be_halved_and_real_times() -> None:
    known, lean = twins(UNet2DConditionModel.from_config(UNET), UNET, "unet")
    inputs = unet_inputs(7, 9)
    inputs["timestep"] = torch.tensor([998.5, 0.25])
    shapes = [(16, 7, 9)] * 3 + [(16, 4, 5)] + [(32, 4, 5)] * 2
    inputs["down_block_additional_residuals"] = tuple(torch.randn(2, *each) for each in shapes)
    inputs["mid_block_additional_residual"] = torch.randn(2, 32, 4, 5)
    assert_close(lean(**inputs)[0], known(**inputs)[0])


def test_an_autoencoder() -> None:
    known, lean = twins(AutoencoderKL.from_config(KL), KL, "vae")
    torch.manual_seed(1)
    pictures = torch.rand(2, 3, 16, 12) * 2 - 1
    assert_close(lean.encode(pictures).latents, known.encode(pictures).latent_dist.mean)
    latents = torch.randn(2, 4, 8, 6)
    assert_close(lean.decode(latents).sample, known.decode(latents).sample)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu", "eos_token_id": 2}])
def test_text_encoders(changes: dict[str, Any]) -> None:
    config = {**CLIP, **changes}
    tokens = torch.tensor([[38, 4, 7, 39, 39, 39], [38, 1, 39, 5, 0, 0]])
    for name, kind in (
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        known, lean = twins(kind(CLIPTextConfig.from_dict(config)), config, name)
        for mask in (None, torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]])):
            given = lean(tokens, mask, output_hidden_states=True)
            expected = known(tokens, mask, output_hidden_states=True)
            assert len(given.hidden_states) == len(expected.hidden_states)
            for one, other in zip(given[-1], expected[-1], strict=True):
                assert_close(one, other)
        if name == "text_encoder_2":
            assert_close(given[0], expected.text_embeds)


def test_sdxl_itself_has_the_same_weights_by_the_same_names() -> None:
    with torch.device("meta"):
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            config = read_json(SDXL_CONFIGS / name / "config.json")
            lean = lean_network(config, name)
            assert lean is not None
            known = build_network(config, name)
            shapes = {key: value.shape for key, value in known.state_dict().items()}
            assert {key: value.shape for key, value in lean.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet", {**UNET, "resnet_time_scale_shift": "scale_shift"}),
        ("unet", {**UNET, "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}),
        ("unet", {**UNET, "addition_embed_type": "image"}),
        ("unet", {**UNET, "transformer_layers_per_block": [[1, 2], [1, 1]]}),
        ("vae", {**KL, "use_quant_conv": False}),
        ("vae", {"_class_name": "AutoencoderTiny", "act_fn": "gelu"}),
        ("text_encoder", {**CLIP, "hidden_act": "relu"}),
    ],
)
def test_what_is_unusual_has_no_lean_network(name: str, config: dict[str, Any]) -> None:
    assert lean_network(config, name) is None
    assert isinstance(lean_network(KL, "vae"), KlAutoencoder)
