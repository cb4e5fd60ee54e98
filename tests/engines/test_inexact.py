"""An inexact engine is judged beside PyTorch before it draws, with LoRAs too."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("openvino")

from twostep.engines import EngineError, openvino, registered_engine
from twostep.engines.accuracy import MOST_LEVELS, WARNING_LEVELS, judge_change
from twostep.engines.blobs import blob_folder
from twostep.models.bundle import Bundle
from twostep.models.loading import load_to_draw
from twostep.models.lora_stack import LoraCache
from twostep.models.runtime import take_notes
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle

BOUND = 2.0
"""How far a mean pixel of nano in 8 bits may be from PyTorch's, in levels of 255."""

PROMPTS = ("a 3d red apple on a blue background", "a flat green fox", "a house beside a tree")


def mean_change(bundles: Sequence[Bundle]) -> float:
    """Return the mean change of a pixel over some prompts, in levels."""
    changes = []
    for prompt in PROMPTS:
        first, second = (
            np.asarray(generate(bundle, Request(prompt, seed=7)).images[0], float)
            for bundle in bundles
        )
        changes.append(np.abs(first - second).mean())
    return float(np.mean(changes))


def test_a_change_is_judged() -> None:
    take_notes()
    judge_change(WARNING_LEVELS, "fast", "nano")
    assert not take_notes()
    judge_change(WARNING_LEVELS + 0.5, "fast", "nano")
    assert take_notes() == ["fast changes a pixel of nano by 2.5 of 255 levels on average."]
    for levels in (MOST_LEVELS + 1, float("nan")):
        with pytest.raises(EngineError, match=r"8 are allowed\. Draw with openvino or eager"):
            judge_change(levels, "fast", "nano")


def test_a_model_that_it_spoils_is_not_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    bundle = random_bundle()
    asked: list[tuple[int, int]] = []

    def change(exact: Bundle, other: Bundle, size: tuple[int, int]) -> float:
        asked.append(size)
        return 30.0

    monkeypatch.setattr(openvino, "picture_change", change)
    for _ in range(2):
        with pytest.raises(EngineError, match=r"openvino-int8 changes a pixel of .* by 30.0"):
            registered_engine("openvino-int8").prepare(bundle, [(64, 64)])
    assert asked == [(64, 64)]  # two pictures, once


@pytest.mark.slow
def test_weights_in_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nncf")
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    take_notes()
    plain = load_to_draw("nano", steps=2)
    small = registered_engine("openvino-int8").prepare(plain, [(64, 64)])
    assert not take_notes()
    change = mean_change((plain, small))
    assert 0 < change < BOUND
    # Of the UNet's 29 MB in float32 the graphs have a quarter and a little.
    denoisers = [path.stat().st_size for path in blob_folder().glob("*.blob")]
    assert any(6e6 < size < 11e6 for size in denoisers)
    assert not any(size > 25e6 for size in denoisers)
    names = [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.resnets.0.conv1",
    ]
    torch.manual_seed(1)
    weights = {}
    for name in names:
        shape = plain.denoiser.network.get_submodule(name).weight.shape
        weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, *shape[1:])
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2))
        weights[f"unet.{name}.lora_B.weight"] = up
    save_file(weights, tmp_path / "style.safetensors")
    styled = LoraCache(plain).apply([f"{tmp_path / 'style.safetensors'}:0.05"])
    assert mean_change((plain, styled)) > 5 * BOUND  # it is seen
    small_styled = registered_engine("openvino-int8").prepare(styled, [(64, 64)])
    assert mean_change((styled, small_styled)) < 2 * BOUND
