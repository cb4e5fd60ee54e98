"""The recipes of AnimateDiff's real sizes are planned, from configs alone."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from twostep.cli import app
from twostep.contract import Contract
from twostep.formats.contracts import SDXL
from twostep.formats.locate import SDXL_BASE
from twostep.formats.motion_files import MotionConfig
from twostep.models.loading import load_bundle
from twostep.models.motion import ANIMATEDIFF_NOISE, motion_contract
from twostep.networks.motion import MotionModule

SD15 = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "unet/config.json": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
        "layers_per_block": 2,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "text_encoder/config.json": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
}
SHAPES = {
    "animatediff-sd15": MotionConfig(),
    "animatediff-sdxl": MotionConfig(channels=(320, 640, 1280), has_middle=False),
}


def write(folder: Path, files: dict[str, object]) -> None:
    for name, values in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def outlined(place: Path, name: str, bases: int) -> Path:
    """Write the configs of a model of clips of real size, without weights."""
    base = SDXL_BASE
    size = ((1024, 1024),)
    if name == "animatediff-sd15":
        write(place / "sd15", SD15)
        base = str(place / "sd15")
        size = ((512, 512),)
    shape = SHAPES[name]
    contract: Contract = replace(
        motion_contract(SDXL, name, recipe="none", version="0"),
        steps=32,
        sizes=size,
        schedule=ANIMATEDIFF_NOISE[shape.channels],
    )
    folder = place / name
    files = {
        "motion.json": {"bases": [base] * bases},
        "motion_adapter/config.json": shape.to_diffusers(),
        "twostep.json": json.loads(contract.to_json()),
    }
    write(folder, files)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_recipes_of_real_sizes_are_planned(name: str, tmp_path: Path) -> None:
    folder = outlined(tmp_path, name, bases=1)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in MotionModule(SHAPES[name]).parameters())
    arguments = ["plan", name, "-o", f'model="{folder}"', "--device", "cuda"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert f"student {count:,}" in answer.output
    # One clip of 16 frames in 16 bits, and what is written beside it.
    side = bundle_side(name)
    assert f"data: {2 * 4 * 16 * side * side + 3:,} bytes" in answer.output
    print(answer.output)


def bundle_side(name: str) -> int:
    """Return the side of the latents."""
    return {"animatediff-sd15": 64, "animatediff-sdxl": 128}[name]


@pytest.mark.slow
def test_sd15_outline_has_its_shapes(tmp_path: Path) -> None:
    from twostep.distill.plan import metering

    with metering(on_cpu=True):
        bundle = load_bundle(outlined(tmp_path, "animatediff-sd15", bases=2), outline=True)
        assert bundle.latent_shape(512, 512) == (4, 16, 64, 64)
        unet = bundle.denoiser.backbone.bases[0]
        # 859.5 million parameters, as is said of Stable Diffusion 1.5's UNet.
        count = sum(parameter.numel() for parameter in unet.parameters())
        assert count == 859_520_964
        assert bundle.text.conditioning(["a fox"], 512, 512).text.shape == (1, 77, 768)
