"""An inexact engine is judged beside PyTorch before it draws, with LoRAs too."""

from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("openvino")

from twostep.engines import EngineError, openvino, registered_engine
from twostep.engines.accuracy import (
    MOST_LEVELS,
    WARNING_LEVELS,
    judge_change,
    picture_change,
)
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.runtime import take_notes
from twostep.pretrain.model import random_bundle


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


def test_the_highest_resolution_is_kept_whole() -> None:
    network = random_bundle().denoiser.network
    whole = openvino.kept_whole(network)
    assert whole == ("conv_in", "conv_out", "down_blocks.0", "up_blocks.2")
    counts = {
        name: sum(p.numel() for p in network.get_submodule(name).parameters()) for name in whole
    }
    assert sum(counts.values()) < 0.05 * sum(p.numel() for p in network.parameters())
    assert openvino.kept_whole(nn.Linear(2, 2)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_nanos_students_bear_eight_bits(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    bundle = load_bundle("nano", steps=steps)
    size = bundle.contract.sizes[0]
    take_notes()
    prepared = registered_engine("openvino-int8").prepare(bundle, [size])
    assert take_notes() == []
    assert 0 < picture_change(bundle, prepared, size) < WARNING_LEVELS
    # It is in 8 bits: all but what is kept whole takes a quarter.
    exact = sum(parameter.nbytes for parameter in bundle.denoiser.network.parameters())
    largest = max(path.stat().st_size for path in (tmp_path / "engines").glob("*.blob"))
    assert largest < 0.5 * exact
