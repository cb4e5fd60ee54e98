"""Models that are loaded to draw with draw what the whole ones do, and need far fewer libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.formats.embeddings import find_embeddings
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_to_draw
from twostep.models.lora_stack import LoraCache
from twostep.networks.lean.config import LeanNetwork
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Control, Picture, Request

PROMPT = "a 3d red apple on a blue background"


@pytest.fixture(scope="module")
def bundles() -> list[Bundle]:
    """The student of two steps, whole and to draw with."""
    return [load_bundle("nano", steps=2), load_to_draw("nano", steps=2)]


def assert_same(bundles: list[Bundle], request: Request) -> None:
    whole, drawing = (generate(bundle, request) for bundle in bundles)
    assert drawing.warnings == whole.warnings
    for one, other in zip(drawing.images, whole.images, strict=True):
        assert one.tobytes() == other.tobytes()


def test_pictures(bundles: list[Bundle]) -> None:
    drawing = bundles[1]
    assert all(isinstance(part, LeanNetwork) for part in drawing.parts.values())
    assert isinstance(drawing.codec.vae, LeanNetwork)
    assert_same(bundles, Request(PROMPT, num_images=2))


def test_changed_pictures_with_controls_and_weights(bundles: list[Bundle]) -> None:
    picture = Picture.of(generate(bundles[1], PROMPT).images[0])
    control = Control(picture)
    assert_same(bundles, Request("a (green:1.3) fox", image=picture, controls=(control,)))


def test_loras_and_embeddings(bundles: list[Bundle], tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(
        {"clip_l": torch.randn(1, 64), "clip_g": torch.randn(1, 96)}, tmp_path / "ink.safetensors"
    )
    (found,) = find_embeddings([tmp_path])
    inked = [bundle.with_embeddings([found]) for bundle in bundles]
    assert_same(inked, Request("a 3d embedding:ink on a blue background"))
    layers = ["unet.mid_block.resnets.0.conv1", "unet.mid_block.attentions.0.proj_in"]
    layers += ["text_encoder.encoder.layers.0.self_attn.q_proj"]
    weights = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        shape = bundles[0].parts[part].get_submodule(name).weight.shape
        weights[f"{layer}.lora_A.weight"] = torch.randn(2, *shape[1:])
        weights[f"{layer}.lora_B.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
    save_file(weights, tmp_path / "style.safetensors")
    styled = [LoraCache(each).apply([f"{tmp_path / 'style.safetensors'}:0.1"]) for each in bundles]
    assert_same(styled, Request(PROMPT))


@pytest.mark.slow
def test_openvino_draws_without_diffusers_and_transformers() -> None:
    pytest.importorskip("openvino")
    code = f"""
import sys
from twostep import Request, Studio
Studio("cpu").draw(Request({PROMPT!r}, engine="openvino"))
heavy = ("diffusers", "transformers", "peft", "scipy", "sympy", "torch._dynamo")
print([name for name in heavy if name in sys.modules])
"""
    for _ in range(2):  # the second time with what the engine kept
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == "[]", answer.stderr
