"""The weights in the package: all there, small enough, what they say they are, and fit for any SDXL
pipeline.
"""

import re

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from twostep.evaluate.judge import load_judge
from twostep.evaluate.metrics import evaluate
from twostep.evaluate.prompts import attributes_from_prompt
from twostep.formats import read_contracts
from twostep.formats.locate import WEIGHTS
from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

NANO = WEIGHTS / "nano"
PROMPTS = (
    "a 3d strawberry on a blue background",
    "a flat sunflower on a brown background",
    "a twemoji pizza on a purple background",
    "a noto watermelon on a white background",
)


def num_right(pictures: torch.Tensor, prompts: list[str]) -> int:
    """Count the pictures without faults that the judge sees; two faults in one count twice."""
    judge = load_judge()
    report = evaluate(
        pictures,
        [attributes_from_prompt(prompt, judge.classes.concepts) for prompt in prompts],
        judge,
    )
    scores = (report.concept, report.style, report.background)
    assert all(score.num_asked == len(prompts) for score in scores)
    return len(prompts) - sum(score.num_asked - score.num_right for score in scores)


def to_tensor(pictures: list) -> torch.Tensor:
    pixels = [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures
    ]
    return torch.stack(pixels).view(-1, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1


def test_there_is_a_teacher_with_four_students() -> None:
    contracts = read_contracts("nano")
    assert [(contract.role, contract.steps) for contract in contracts] == [
        ("teacher", 32),
        ("student", 8),
        ("student", 4),
        ("student", 2),
        ("student", 1),
    ]
    assert [contract.recipe for contract in contracts] == ["nano-teacher"] + ["nano"] * 4
    assert contracts[-1].prediction_type == "x0"


def test_the_students_of_8_4_and_2_steps_are_there_as_small_loras_as_well() -> None:
    files = {path.stem: path.stat().st_size for path in NANO.rglob("*_lora.safetensors")}
    assert set(files) == {f"nano_{steps}step_lora" for steps in (8, 4, 2)}
    assert max(files.values()) <= 2e6
    for name in files:
        (contract,) = read_contracts(name)
        assert (contract.lora_rank, contract.recipe, contract.guidance) == (12, "nano-lora", 1.0)


@pytest.mark.parametrize("steps", [8, 4, 2])
def test_the_loras_draw_what_they_are_asked(steps: int) -> None:
    bundle = load_bundle(f"nano_{steps}step_lora")
    drawn = [
        image
        for prompt in PROMPTS
        for image in generate(bundle, Request(prompt, num_images=4, seed=5)).images
    ]
    assert num_right(to_tensor(drawn), [prompt for prompt in PROMPTS for _ in range(4)]) >= 10


def test_they_are_fp16_and_below_80_megabytes() -> None:
    files = list(NANO.rglob("*.safetensors"))
    loras, control = set(NANO.rglob("*_lora.safetensors")), set((NANO / "controlnet").glob("*"))
    assert sum(file.stat().st_size for file in set(NANO.rglob("*")) - loras - control) < 80e6
    assert sum(file.stat().st_size for file in control) < 4e6
    networks = [file for file in files if file.name != "judge.safetensors"]
    assert {
        tensor.dtype for file in networks for tensor in load_file(file).values() if tensor.ndim
    } == {torch.float16}


def test_they_say_nothing_of_the_machine_they_come_from() -> None:
    texts = {path.name: path.read_text() for path in NANO.rglob("*.json")}
    assert [
        name
        for name, text in texts.items()
        if "_name_or_path" in text or re.search(r'"/\w+/', text)
    ] == []


@pytest.mark.parametrize("steps", [pytest.param(32, marks=pytest.mark.slow), 8, 4, 2, 1])
def test_they_draw_what_they_are_asked(steps: int) -> None:
    bundle = load_bundle("nano", steps=steps)
    drawn = [
        image
        for prompt in PROMPTS
        for image in generate(bundle, Request(prompt, num_images=4, seed=5)).images
    ]
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    assert num_right(to_tensor(drawn), prompts) >= 10  # of 16; chance is one in 5,520 each


@pytest.mark.parametrize("steps", [8, 2])
def test_vanilla_diffusers_loads_them_and_draws(steps: int) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        NANO, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    if steps == 2:
        weights = load_file(NANO / "students" / "nano_2step_unet.safetensors")
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config)
        pipeline.unet.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    drawn = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=0.0 if steps == 2 else 3.0,
        generator=torch.Generator().manual_seed(3),
        width=64,
        height=64,
    ).images
    assert num_right(to_tensor(drawn), prompts) >= 4  # of 8
