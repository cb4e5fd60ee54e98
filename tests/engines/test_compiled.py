"""torch.compile draws what PyTorch does; without a compiler PyTorch draws, with a word."""

import pytest
import torch

from twostep.engines import compiled, registered_engine
from twostep.models.runtime import take_notes
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle


def test_without_a_compiler_pytorch_draws_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_missing_compiler", lambda device: "there is no C++ compiler.")
    bundle = random_bundle()
    take_notes()
    prepared = registered_engine("compiled").prepare(bundle, [(64, 64)])
    assert prepared is bundle
    result = generate(prepared, Request("a red apple", steps=1))
    assert "compiled draws with eager: there is no C++ compiler." in result.warnings
    assert result.request.engine == "eager"


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_missed() -> None:
    from torch._inductor import config

    assert compiled._missing_compiler(torch.device("cpu")) is None
    with config.patch({"cpp.cxx": ("/nowhere/g++",)}):
        missing = compiled._missing_compiler(torch.device("cpu"))
    assert missing == "there is no C++ compiler. Install g++ or clang, or set CXX to one."
    assert compiled._missing_compiler(torch.device("cuda")) is None  # which needs none
