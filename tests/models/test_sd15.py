"""Picture models of Stable Diffusion 1.5's kind, under a motion module, against diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel
from typer.testing import CliRunner

from twostep import Request, generate
from twostep.cli import app
from twostep.formats.locate import ModelError
from twostep.formats.motion_files import MotionConfig, MotionError, to_animatediff
from twostep.models.loading import load_bundle
from twostep.models.motion import adopt_motion_module, load_pictures, picture_unet
from twostep.networks.motion import MotionModule
from twostep.pretrain.model import TEST_CORPUS
from twostep.pretrain.tokenizer import build_tokenizer

PROMPT = "a red fox on a blue background"
SHAPE = MotionConfig(channels=(32, 64), layers=2, heads=8, groups=32, max_frames=8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Return a tiny pipeline with random weights, and the folder that it is saved in."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    tokenizer = build_tokenizer([TEST_CORPUS], 20)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False
    )
    made = StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    made.save_pretrained(folder)
    return made, folder


@pytest.fixture(scope="module")
def module_file(tmp_path_factory):
    torch.manual_seed(1)
    network = MotionModule(SHAPE)
    for name, parameter in network.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("files") / "mm.safetensors"
    save_file(to_animatediff(network.state_dict(), SHAPE), path)
    return path


@pytest.mark.slow
def test_adopted_module_draws_what_diffusers_draws(pipeline, module_file, tmp_path) -> None:
    made, folder = pipeline
    adopted = adopt_motion_module(
        module_file, [str(folder)], tmp_path / "animated", frames=4, schedule=None
    )
    bundle = load_bundle(adopted)
    assert bundle.contract.sizes[0] == (64, 64) and bundle.contract.guidance == 7.5
    assert bundle.contract.schedule.betas == "linear"
    request = Request(PROMPT, steps=2, guidance=1.0, seed=3, init_noise="diffusers")
    (clip,) = generate(bundle, request).images
    adapter = MotionAdapter.from_pretrained(adopted / "motion_adapter")
    theirs = AnimateDiffPipeline(
        vae=made.vae,
        text_encoder=made.text_encoder,
        tokenizer=made.tokenizer,
        unet=made.unet,
        motion_adapter=adapter,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            timestep_spacing="trailing",
        ),
    )
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    frames = theirs(
        PROMPT,
        num_frames=4,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=1.0,
        latents=noise,
        output_type="np",
    ).frames[0]
    own = torch.stack([torch.frombuffer(f.tobytes(), dtype=torch.uint8) for f in clip.frames])
    expected = torch.from_numpy(frames).flatten(1) * 255
    # Weights were rounded to 16 bits in the folder.
    assert (own.float() - expected).abs().mean() < 1.5


@pytest.mark.slow
def test_what_does_not_fit_is_refused(pipeline, module_file, tmp_path) -> None:
    _, folder = pipeline
    with pytest.raises(MotionError, match="another family"):
        adopt_motion_module(module_file, ["nano"], tmp_path / "none")
    assert not (tmp_path / "none").exists()
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MotionError, match="no motion module"):
        adopt_motion_module(tmp_path / "other.safetensors", [str(folder)], tmp_path / "none")
    with pytest.raises(ModelError, match="No such file"):
        adopt_motion_module(tmp_path / "missing.safetensors", [str(folder)], tmp_path / "none")
    with pytest.raises(ModelError):
        load_pictures([str(tmp_path)])


def test_the_command_makes_a_model_of_clips_that_draws(tmp_path: Path) -> None:
    shape = MotionConfig.on(picture_unet(load_pictures(["nano"], outline=True)[0]).config, heads=8)
    weights = MotionModule(shape).state_dict()
    save_file(to_animatediff(weights, shape), tmp_path / "mm.safetensors")
    folder = tmp_path / "moving"
    given = ["adopt", str(tmp_path / "mm.safetensors"), "--base", "nano", "--out", str(folder)]
    answer = CliRunner().invoke(app, [*given, "--frames", "4"])
    assert answer.exit_code == 0, answer.output
    assert answer.output.strip() == str(folder)
    (clip,) = generate(load_bundle(folder), Request("a red fox", steps=1, guidance=1.0)).images
    assert len(clip.frames) == 4
    missing = CliRunner().invoke(app, ["adopt", "missing.safetensors", *given[2:]])
    assert missing.exit_code == 1 and "No such file" in missing.output
