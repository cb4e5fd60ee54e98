"""OpenVINO's graphs are kept, and faults get a word."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("openvino")

from twostep.engines import EngineError, openvino, registered_engine
from twostep.engines.blobs import read_blob, write_blob
from twostep.engines.openvino import OpenVino, graph_calls
from twostep.models.runtime import take_notes
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
def test_a_blob_of_something_else_is_made_anew_with_a_word(cache: Path) -> None:
    network = Small()
    x = torch.randn(1, 3, 8, 8)
    OpenVino().convert(network)(x, 1.0)
    (path,) = cache.iterdir()
    blob = read_blob(path.stem)
    assert blob is not None
    for description, body in (
        ({"answer": "no structure"}, blob.body.tobytes()),
        (blob.description, b"what another version made"),
    ):
        assert write_blob(path.stem, description, body)
        torch.testing.assert_close(OpenVino().convert(network)(x, 1.0), network(x, 1.0))
        (note,) = take_notes()
        assert "was not usable and is made anew" in note


def test_answers_are_not_written_over_and_what_changes_in_place_is_seen(cache: Path) -> None:
    network = Small()
    converted = OpenVino().convert(network)
    x = torch.zeros(1, 3, 8, 8)
    converted(x, 1.0)  # which compares the graph with PyTorch
    with torch.inference_mode(), graph_calls() as calls:
        first = converted(x, 1.0)
        kept = first["y"].clone()
        x += 1
        second = converted(x, 1.0)
        torch.testing.assert_close(second["y"], network(x, 1.0)["y"])
        assert torch.equal(first["y"], kept)
        # A tensor in the place of one that is gone is taken for what it is.
        for number in range(5):
            x = torch.full((1, 3, 8, 8), float(number))
            torch.testing.assert_close(converted(x, 1.0)["y"], network(x, 1.0)["y"])
        recorded = [call.again() for call in calls]
        for call in recorded:
            call()
        torch.testing.assert_close(second["y"], network(torch.ones_like(x), 1.0)["y"])
    assert len(recorded) == 7


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


@pytest.mark.parametrize("before", [None, "false"])
def test_what_is_converted_is_not_reported(
    before: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opt_in_checker = pytest.importorskip("openvino_telemetry.utils.opt_in_checker")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):
        monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv("CI", before)

    def is_refused() -> bool:
        found = opt_in_checker.OptInChecker().check(enable_opt_in_dialog=False, disable_in_ci=True)
        return bool(found == opt_in_checker.ConsentCheckResult.DECLINED)

    assert not is_refused()
    with openvino.unreported():
        assert is_refused()
    assert os.environ.get("CI") == before
    assert not is_refused()
