"""OpenVINO draws what PyTorch does, in every task; graphs are kept; faults get a word."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("openvino")

from tests import students
from twostep.engines import EngineError, openvino, registered_engine
from twostep.engines.openvino import OpenVino
from twostep.models.bundle import Bundle
from twostep.models.lora_stack import LoraCache
from twostep.models.runtime import take_notes
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Control, Picture, Request
from twostep.pretrain.model import random_bundle


class Small(nn.Module):
    """A convolution and what follows it, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, scale: float) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"y": y * scale, "mean": y.mean(dim=(1, 2, 3))}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    take_notes()
    return tmp_path / "engines"


def test_a_network_is_compiled_once_for_every_size_and_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Small()
    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        expected = network(x, 0.5)
        torch.testing.assert_close(OpenVino().convert(network)(x, 0.5), expected)
        assert len(list(cache.iterdir())) == 2  # a batch of two and a single one
        with monkeypatch.context() as patch:
            patch.setattr(openvino, "_traced", None)  # nothing is traced any more
            torch.testing.assert_close(OpenVino().convert(network)(x, 0.5), expected)
        network.layer.weight.mul_(2)
        torch.testing.assert_close(OpenVino().convert(network)(x, 0.5), network(x, 0.5))
        assert len(list(cache.iterdir())) == 4  # other weights, other graphs
    assert take_notes() == []


@pytest.mark.slow
def test_a_blob_that_cannot_be_used_is_made_anew_with_a_word(cache: Path) -> None:
    network = Small()
    x = torch.randn(1, 3, 8, 8)
    expected = network(x, 1.0)
    OpenVino().convert(network)(x, 1.0)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    torch.testing.assert_close(OpenVino().convert(network)(x, 1.0), expected)
    (note,) = take_notes()
    assert "was not usable and is made anew" in note
    # What was made anew is read without a word.
    torch.testing.assert_close(OpenVino().convert(network)(x, 1.0), expected)
    assert not take_notes()


@pytest.mark.slow
def test_a_wrong_graph_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Small()
    traced = openvino._traced

    def doubled(network: nn.Module, call: Any, tensors: list[Tensor]) -> Any:
        with torch.no_grad():
            network.layer.weight.mul_(2)
            model = traced(network, call, tensors)
            # The model may share memory with the weights, so it is given its own.
            network.layer.weight = nn.Parameter(network.layer.weight / 2)
        return model

    monkeypatch.setattr(openvino, "_traced", doubled)
    x = torch.randn(1, 3, 8, 8)
    expected = network(x, 1.0)
    torch.testing.assert_close(OpenVino().convert(network)(x, 1.0), expected)
    (note,) = take_notes()
    assert "openvino cannot run Small for 1x3x8x8 (its numbers differ by" in note
    assert not list(cache.glob("*.blob"))


def test_what_openvino_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = random_bundle()
    with pytest.raises(EngineError, match=r"float32 on the CPU; this one is in bfloat16 on cpu"):
        registered_engine("openvino").prepare(bundle.to(torch.device("cpu"), torch.bfloat16), [])
    bundle = bundle.to(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(openvino, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(EngineError, match="needs a processor with bf16 instructions"):
        registered_engine("openvino-bf16").prepare(bundle, [])
    monkeypatch.setattr(openvino, "find_spec", lambda name: None if name == "nncf" else 1)
    with pytest.raises(EngineError, match="needs nncf, which is not installed"):
        registered_engine("openvino-int8").prepare(bundle, [])
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"not installed. Run `pip install 'twostep\[openvino\]'"):
        registered_engine("openvino").prepare(bundle, [])


# From here on all of nano, with random weights, of which every graph takes seconds to compile.


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


def assert_same_pictures(eager: Bundle, request: Request) -> None:
    """Draw with both and compare, to one level of 255."""
    engine = registered_engine("openvino")
    take_notes()
    first = generate(eager, request)
    second = generate(engine.prepare(eager, []), request)
    assert second.request.engine == "openvino"
    assert second.warnings == first.warnings
    for one, other in zip(first.images, second.images, strict=True):
        difference = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert difference.max() <= 1
        assert np.asarray(one).std() > 1  # of a picture, not of nothing


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps(as_student: Callable[[int], Bundle], steps: int) -> None:
    assert_same_pictures(as_student(steps), Request("a red apple", num_images=3, seed=5))


@pytest.mark.slow
def test_guidance(teacher: Bundle) -> None:
    assert_same_pictures(
        teacher, Request("a red apple", steps=4, guidance=4.0, negative_prompt="b")
    )


@pytest.mark.slow
def test_from_an_image(as_student: Callable[[int], Bundle], picture: Picture) -> None:
    assert_same_pictures(as_student(4), Request("a red apple", image=picture, strength=0.5))


@pytest.mark.slow
def test_inpainting(as_student: Callable[[int], Bundle], picture: Picture) -> None:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((20, 20, 60, 44), fill=255)
    request = Request("a red apple", image=picture, mask=Picture.of(mask))
    assert_same_pictures(as_student(4), request)


@pytest.mark.slow
def test_controls(as_student: Callable[[int], Bundle], picture: Picture) -> None:
    controls = (Control(picture, scale=0.8, end=0.5), Control(picture, scale=0.3))
    assert_same_pictures(as_student(2), Request("a red apple", controls=controls))


@pytest.mark.slow
def test_loras(as_student: Callable[[int], Bundle], lora: Path) -> None:
    plain = as_student(2)
    styled = LoraCache(plain).apply([f"{lora}:0.7"])
    request = Request("a red apple", loras=(f"{lora}:0.7",))
    assert_same_pictures(styled, request)
    without = generate(plain, Request("a red apple")).images[0]
    assert without.tobytes() != generate(styled, request).images[0].tobytes()


@pytest.mark.slow
def test_weighted_and_long_prompts(as_student: Callable[[int], Bundle]) -> None:
    assert_same_pictures(as_student(1), Request("a (red:1.3) apple " + "on a blue table " * 9))
