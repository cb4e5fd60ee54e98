"""Engines are found by name, registered, or named as an attribute; what is none is refused."""

import sys
from types import SimpleNamespace

import pytest

from twostep.engines import (
    Engine,
    EngineError,
    find_engine,
    register_engine,
    registered_engine,
)
from twostep.engines.engine import _ENGINES
from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle


class Toy:
    name = "toy"

    def prepare(self, bundle: Bundle, sizes: object) -> Bundle:
        return bundle


def test_eager_draws_with_the_bundle_itself() -> None:
    bundle = random_bundle()
    engine = find_engine("eager")
    assert isinstance(engine, Engine)
    assert engine.name == "eager"
    assert engine.prepare(bundle, [(64, 64)]) is bundle


def test_an_engine_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostep.engines.engine._ENGINES", dict(_ENGINES))
    toy = Toy()
    register_engine(toy)
    register_engine(toy)
    assert find_engine("toy") is toy
    with pytest.raises(EngineError, match="an engine called 'toy' already"):
        register_engine(Toy())


def test_an_engine_is_named_as_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy()
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(toy=toy, number=3))
    assert find_engine("mine:toy") is toy
    with pytest.raises(EngineError, match=r"mine:number is a int, not an engine"):
        find_engine("mine:number")
    with pytest.raises(EngineError, match=r"'mine:other' cannot be loaded"):
        find_engine("mine:other")
    with pytest.raises(EngineError, match=r"'nowhere:toy' cannot be loaded: No module"):
        find_engine("nowhere:toy")
    with pytest.raises(EngineError, match=r"no engine 'steam'\. Known are auto, compiled, eager"):
        find_engine("steam")
    with pytest.raises(
        EngineError, match=r"no engine 'mine:toy'\. Known are auto, compiled, eager"
    ):
        registered_engine("mine:toy")  # which a request may name, and which imports nothing
