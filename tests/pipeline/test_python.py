"""What people do with a model in Python: a bare prompt, pickling, another default precision."""

import io
import pickle

import numpy as np
import pytest
import torch

import twostep
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request


@pytest.fixture(scope="module")
def expected(student: Bundle) -> np.ndarray:
    return np.asarray(generate(student, Request("a red fox")).images[0])


def pixels(bundle: Bundle) -> np.ndarray:
    return np.asarray(generate(bundle, "a red fox").images[0])


def test_a_prompt_is_a_request(student: Bundle, expected: np.ndarray) -> None:
    assert np.array_equal(np.asarray(twostep.generate(student, "a red fox").images[0]), expected)


def test_a_model_goes_through_pickle(student: Bundle, expected: np.ndarray) -> None:
    assert np.array_equal(pixels(pickle.loads(pickle.dumps(student))), expected)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    assert np.array_equal(pixels(torch.load(buffer, weights_only=False)), expected)


def test_another_default_precision_changes_nothing(student: Bundle, expected: np.ndarray) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        drawn = pixels(student)
        loaded = twostep.load("nano", steps=2)
        weighted = generate(loaded, "a (red:1.3) fox, " * 3)
    finally:
        torch.set_default_dtype(before)
    assert np.array_equal(drawn, expected)
    assert {weight.dtype for weight in loaded.parts["unet"].parameters()} == {torch.float32}
    plain = generate(loaded, "a (red:1.3) fox, " * 3)
    assert np.array_equal(np.asarray(weighted.images[0]), np.asarray(plain.images[0]))


def test_a_lora_that_is_not_on_the_model_is_warned_of(student: Bundle) -> None:
    result = generate(student, "a red fox <lora:ink:0.8>")
    assert any("ink:0.8 is not on this model" in warning for warning in result.warnings)
