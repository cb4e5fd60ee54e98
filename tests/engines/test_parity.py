"""Every engine draws what PyTorch does, in every task, to one level of 255."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from tests import students
from twostep.engines import registered_engine
from twostep.models.bundle import Bundle
from twostep.models.loading import load_to_draw
from twostep.models.lora_stack import LoraCache
from twostep.models.runtime import take_notes
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Control, Picture, Request
from twostep.pretrain.model import random_bundle

pytestmark = pytest.mark.slow  # of nano's size, every graph of which takes seconds to make

IN_GRAPHS = ("openvino", "onnx")


@pytest.fixture(params=IN_GRAPHS)
def engine(request: pytest.FixtureRequest) -> str:
    pytest.importorskip({"openvino": "openvino", "onnx": "onnxruntime"}[request.param])
    return str(request.param)


@pytest.fixture(scope="module")
def teacher() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="module")
def as_student(teacher: Bundle) -> Callable[[int], Bundle]:
    """The teacher's weights under a student's contract; one step predicts x0."""
    return partial(students.as_student, teacher)


@pytest.fixture(scope="module")
def picture() -> Picture:
    image = Image.new("RGB", (64, 64), (30, 90, 160))
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=(230, 60, 40))
    return Picture.of(image)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, teacher: Bundle) -> Path:
    """A style of rank 2 on two layers, strong enough to be seen."""
    names = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ]
    torch.manual_seed(1)
    weights = {}
    for name in names:
        shape = teacher.denoiser.network.get_submodule(name).weight.shape
        weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, *shape[1:])
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
        weights[f"unet.{name}.lora_B.weight"] = up
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(weights, path)
    return path


def assert_same_pictures(engine: str, eager: Bundle, request: Request) -> None:
    """Draw with both and compare, to one level of 255."""
    take_notes()
    first = generate(eager, request)
    size = eager.contract.sizes[0]
    second = generate(registered_engine(engine).prepare(eager, [size]), request)
    assert second.request.engine == engine
    assert second.warnings == first.warnings
    for one, other in zip(first.images, second.images, strict=True):
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert difference.max() <= 1
        assert np.asarray(one).std() > 1  # of a picture, not of nothing


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps(engine: str, as_student: Callable[[int], Bundle], steps: int) -> None:
    assert_same_pictures(engine, as_student(steps), Request("a red apple", num_images=3, seed=5))


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_models_that_are_loaded_to_draw(name: str) -> None:
    request = Request("a 3d red apple on a blue background", seed=5)
    assert_same_pictures(name, load_to_draw("nano", steps=2), request)


def test_guidance(engine: str, teacher: Bundle) -> None:
    request = Request("a red apple", steps=4, guidance=4.0, negative_prompt="b")
    assert_same_pictures(engine, teacher, request)


def test_from_an_image(engine: str, as_student: Callable[[int], Bundle], picture: Picture) -> None:
    request = Request("a red apple", image=picture, strength=0.5)
    assert_same_pictures(engine, as_student(4), request)


def test_inpainting(engine: str, as_student: Callable[[int], Bundle], picture: Picture) -> None:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((20, 20, 60, 44), fill=255)
    request = Request("a red apple", image=picture, mask=Picture.of(mask))
    assert_same_pictures(engine, as_student(4), request)


def test_controls(engine: str, as_student: Callable[[int], Bundle], picture: Picture) -> None:
    controls = (Control(picture, scale=0.8, end=0.5), Control(picture, scale=0.3))
    assert_same_pictures(engine, as_student(2), Request("a red apple", controls=controls))


def test_loras(engine: str, as_student: Callable[[int], Bundle], lora: Path) -> None:
    plain = as_student(2)
    styled = LoraCache(plain).apply([f"{lora}:0.7"])
    request = Request("a red apple", loras=(f"{lora}:0.7",))
    assert_same_pictures(engine, styled, request)
    without = generate(plain, Request("a red apple")).images[0]
    assert without.tobytes() != generate(styled, request).images[0].tobytes()


def test_weighted_and_long_prompts(engine: str, as_student: Callable[[int], Bundle]) -> None:
    request = Request("a (red:1.3) apple " + "on a blue table " * 9)
    assert_same_pictures(engine, as_student(1), request)
