"""`auto` takes the faster of the exact engines by a table that is measured once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twostep.engines import EngineError, auto, registered_engine
from twostep.models.bundle import Bundle
from twostep.models.runtime import Runtime, take_notes
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.model import random_bundle

pytest.importorskip("openvino")

SIZE = (64, 64)


class Fake:
    """An engine with a name alone."""

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        return replace(bundle, runtime=Runtime("openvino"))


class Missing:
    """An engine that is not installed."""

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        raise EngineError("the engine openvino is not installed.")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return random_bundle()


@pytest.fixture
def seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What every engine takes from now on, and nothing measured before."""
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "EXACT", Fake())
    table = {"eager": 2.0, "openvino": 1.0}
    monkeypatch.setattr(auto, "_seconds", lambda bundle, size: table[bundle.runtime.engine])
    take_notes()
    return table


def chosen(bundle: Bundle, size: tuple[int, int] = SIZE) -> str:
    return registered_engine("auto").prepare(bundle, [size]).runtime.engine


def test_the_faster_one_is_taken_by_what_was_measured_once(
    bundle: Bundle, seconds: dict[str, float]
) -> None:
    assert chosen(bundle) == "openvino"
    seconds["openvino"] = 3.0
    assert chosen(bundle) == "openvino"  # by the table
    assert chosen(bundle, (128, 64)) == "eager"  # another size is measured for itself
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert chosen(bundle) == "eager"  # and so is another number of threads
    finally:
        torch.set_num_threads(threads)
    assert not take_notes()


def test_without_openvino_it_is_pytorch_with_a_word(
    bundle: Bundle, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "EXACT", Missing())
    assert chosen(bundle) == "eager"
    assert take_notes() == ["auto draws with eager: the engine openvino is not installed."]


def test_on_an_accelerator_it_is_pytorch(
    bundle: Bundle, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds.clear()  # nothing is measured
    monkeypatch.setattr(Denoiser, "device", property(lambda self: torch.device("cuda")))
    assert chosen(bundle) == "eager"


@pytest.mark.slow
def test_what_is_measured_is_a_call_of_the_denoiser(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    assert chosen(bundle) in ("eager", "openvino")
    (table,) = (tmp_path / "engines").glob("*.json")
    assert '"eager": ' in table.read_text() and '"openvino": ' in table.read_text()
