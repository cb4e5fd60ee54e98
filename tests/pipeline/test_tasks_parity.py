"""Every task gives the latents that vanilla diffusers gives: image to image, inpainting,
ControlNets.

The models are nano and its students, the noise is the same, and `init_noise` is diffusers'.
diffusers begins an image at step int(N x strength) of N, we at the nearest trained time; the
strengths here are those where that is one and the same time.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw

from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Control, Picture, Request

from ..vanilla import assemble

PROMPT = "a 3d green apple on a yellow background"
SEED = 11
STUDENTS = (8, 4, 2, 1)
EXTRA = {"image_encoder": None, "feature_extractor": None}


@pytest.fixture(scope="module")
def models() -> dict[int, Bundle]:
    return {steps: load_bundle("nano", steps=steps) for steps in (*STUDENTS, 32)}


@pytest.fixture(scope="module")
def image(models: dict[int, Bundle]) -> Image.Image:
    return generate(models[2], Request("a 3d red apple on a blue background", seed=7)).images[0]


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """Round, made of whole latents: of others, diffusers looks at one pixel, we at all of them."""
    mask = Image.new("L", (16, 16))
    ImageDraw.Draw(mask).ellipse((3, 4, 11, 12), fill=255)
    return mask.resize((64, 64), Image.Resampling.NEAREST)


def vanilla(
    bundle: Bundle, kind: type, more: dict[str, object] | None = None, **arguments: object
) -> torch.Tensor:
    """Draw latents with a pipeline of diffusers: Euler, trailing, the noise of the seed."""
    prediction_type = {"eps": "epsilon", "x0": "sample"}[bundle.denoiser.prediction_type]
    parts = assemble(
        bundle, timestep_spacing="trailing", prediction_type=prediction_type
    ).components
    pipeline = kind(**{**parts, **EXTRA, **(more or {})}, force_zeros_for_empty_prompt=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    asked = {
        "num_inference_steps": bundle.contract.steps,
        "guidance_scale": bundle.contract.guidance,
        **arguments,
    }
    return pipeline(
        PROMPT,
        negative_prompt="",
        generator=generator,
        width=64,
        height=64,
        output_type="latent",
        **asked,
    ).images[0]


def ours(bundle: Bundle, **wishes: object) -> torch.Tensor:
    foreseen: list[torch.Tensor] = []
    request = Request(PROMPT, seed=SEED, init_noise="diffusers", **wishes)
    generate(bundle, request, on_step=lambda progress: foreseen.append(progress.prediction.x0[0]))
    return foreseen[-1]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("steps", [*STUDENTS, pytest.param(32, marks=pytest.mark.slow)])
def test_text_to_image(models: dict[int, Bundle], steps: int) -> None:
    theirs = vanilla(models[steps], type(assemble(models[steps])))
    assert relative_difference(ours(models[steps]), theirs) < 1e-4
    assert relative_difference(ours(models[steps]), generate_purely(models[steps])) > 1e-4


def generate_purely(bundle: Bundle) -> torch.Tensor:
    foreseen: list[torch.Tensor] = []
    generate(
        bundle,
        Request(PROMPT, seed=SEED),
        on_step=lambda progress: foreseen.append(progress.prediction.x0[0]),
    )
    return foreseen[-1]


STRENGTHS = [(8, 0.375), (8, 0.75), (4, 0.25), (4, 0.75), (2, 0.5), (2, 1.0), (1, 1.0), (32, 0.25)]


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
def test_image_to_image(
    models: dict[int, Bundle], image: Image.Image, steps: int, strength: float
) -> None:
    theirs = vanilla(
        models[steps], StableDiffusionXLImg2ImgPipeline, image=image, strength=strength
    )
    mine = ours(models[steps], image=Picture.of(image), strength=strength)
    assert relative_difference(mine, theirs) < 1e-4


@pytest.mark.parametrize(("steps", "strength"), STRENGTHS)
def test_inpainting(
    models: dict[int, Bundle], image: Image.Image, mask: Image.Image, steps: int, strength: float
) -> None:
    bundle = models[steps]
    theirs = vanilla(
        bundle, StableDiffusionXLInpaintPipeline, image=image, mask_image=mask, strength=strength
    )
    mine = ours(bundle, image=Picture.of(image), mask=Picture.of(mask), strength=strength)
    # What the last step foresees is not blended yet; where nothing is drawn theirs is the encoded
    # image itself.
    drawn = torch.nn.functional.interpolate(
        torch.tensor(list(mask.tobytes()), dtype=torch.float32).view(1, 1, 64, 64), (16, 16)
    )[0].bool().expand_as(mine)  # fmt: skip
    assert 20 < drawn[0].sum() < 200
    assert relative_difference(mine[drawn], theirs[drawn]) < 1e-4
    pixels = (
        torch.tensor(list(image.tobytes()), dtype=torch.float32)
        .view(1, 64, 64, 3)
        .permute(0, 3, 1, 2)
    )
    known = bundle.codec.encode(pixels / 127.5 - 1)[0]
    assert relative_difference(known[~drawn], theirs[~drawn]) < 1e-4


@pytest.fixture(scope="module")
def inpainting(models: dict[int, Bundle]) -> Bundle:
    """A nano that takes nine channels, with random weights where there were none."""
    teacher = models[32]
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        {**teacher.denoiser.network.config, "in_channels": 9}
    ).eval()
    weights = {
        key: value
        for key, value in teacher.denoiser.network.state_dict().items()
        if key != "conv_in.weight"
    }
    unet.load_state_dict(weights, strict=False)
    return replace(teacher, denoiser=teacher.denoiser.with_network(unet.requires_grad_(False)))


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_inpainting_with_nine_channels(
    inpainting: Bundle, image: Image.Image, mask: Image.Image, guidance: float, strength: float
) -> None:
    asked = {"image": image, "mask_image": mask, "strength": strength, "num_inference_steps": 8}
    theirs = vanilla(inpainting, StableDiffusionXLInpaintPipeline, guidance_scale=guidance, **asked)
    pictures = {"image": Picture.of(image), "mask": Picture.of(mask)}
    mine = ours(inpainting, **pictures, strength=strength, steps=8, guidance=guidance)
    assert relative_difference(mine, theirs) < 1e-4


@pytest.fixture(scope="module")
def controls(models: dict[int, Bundle], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two ControlNets of nano that say something: what they add is zero at first."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = ControlNetModel.from_unet(
            models[32].denoiser.network, conditioning_embedding_out_channels=(16, 32, 64)
        )
        for block in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            torch.nn.init.normal_(block.weight, std=0.02)
        torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.1)
        folders.append(tmp_path_factory.mktemp("controls") / f"control{seed}")
        network.save_pretrained(folders[-1])
    return folders


@pytest.mark.parametrize("steps", [*STUDENTS, pytest.param(32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_controlnets(
    models: dict[int, Bundle],
    mask: Image.Image,
    image: Image.Image,
    controls: list[Path],
    steps: int,
    count: int,
) -> None:
    pictures, scales = [mask.convert("RGB"), image][:count], [0.8, 0.6][:count]
    intervals = [(0.0, 0.5 if steps > 1 else 1.0), (0.25 if steps > 2 else 0.0, 1.0)][:count]
    networks = [ControlNetModel.from_pretrained(folder) for folder in controls[:count]]
    theirs = vanilla(
        models[steps],
        StableDiffusionXLControlNetPipeline,
        {"controlnet": MultiControlNetModel(networks) if count > 1 else networks[0]},
        image=pictures if count > 1 else pictures[0],
        controlnet_conditioning_scale=scales if count > 1 else scales[0],
        control_guidance_start=[start for start, _ in intervals],
        control_guidance_end=[end for _, end in intervals],
    )
    told = tuple(
        Control(Picture.of(picture), str(folder), scale, *interval)
        for picture, folder, scale, interval in zip(
            pictures, controls, scales, intervals, strict=False
        )
    )
    mine = ours(models[steps], controls=told)
    assert relative_difference(mine, theirs) < 1e-4
    assert relative_difference(ours(models[steps]), theirs) > 1e-3, "the ControlNets say nothing"
