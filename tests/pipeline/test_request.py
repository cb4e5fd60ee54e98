"""Requests refuse what no model could honour, and say what would be right."""

import subprocess
import sys

import pytest

from twostep.pipeline.request import LoraChoice, Request, RequestError

WRONG = [
    ({"model": " "}, "a name that is not empty"),
    ({"engine": ""}, "a name that is not empty"),
    ({"loras": ("",)}, "file:weight"),
    ({"num_images": 0}, "at least one image"),
    ({"seed": -1}, "from 0 up"),
    ({"seed": 2**63}, "below 2\\*\\*63"),
    ({"seed": 2**63 - 1, "num_images": 2}, "below 2\\*\\*63"),
    ({"steps": 0}, "take the model's own"),
    ({"width": 0}, "take the model's own"),
    ({"height": -64}, "take the model's own"),
    ({"guidance": -1.0}, "from 0 up"),
    ({"guidance": float("nan")}, "from 0 up"),
    ({"guidance": float("inf")}, "from 0 up"),
]


@pytest.mark.parametrize(("values", "lesson"), WRONG)
def test_impossible_value_is_refused_with_advice(values: dict[str, object], lesson: str) -> None:
    with pytest.raises(RequestError, match=lesson):
        Request("a fox", **values)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="UTF-8"):
        Request("a \udcff fox")


WRONG_TYPES = [
    "['a fox', 'an owl']",
    "'a', num_images=1.5",
    "'a', seed='7'",
    "'a', seed=True",
    "'a', steps=2.0",
    "'a', negative_prompt=None",
    "'a', model=3",
    "'a', loras=(3,)",
    "'a', engine=None",
]


def test_wrong_types_are_refused_in_production_too() -> None:
    """The type checker of these tests would be faster, so a bare interpreter asks; torch is not
    needed for it.
    """
    code = f"""
import sys
from twostep.pipeline.request import Request, RequestError
for arguments in {WRONG_TYPES}:
    try:
        eval(f"Request({{arguments}})")
    except RequestError as error:
        print(error)
print("torch" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    *lessons, torch_loaded = answer.stdout.splitlines()
    assert len(lessons) == len(WRONG_TYPES), lessons
    assert all("expected" in lesson for lesson in lessons)
    assert torch_loaded == "False"


def test_largest_seed_is_allowed() -> None:
    assert Request("a fox", seed=2**63 - 2, num_images=2).seeds == [2**63 - 2, 2**63 - 1]


def test_json_round_trip() -> None:
    request = Request('a "fox", größer', num_images=3, seed=5, guidance=4.5, width=64)
    assert Request.from_json(request.to_json()) == request


def test_the_model_and_its_loras_survive_json() -> None:
    loras = ("ink.safetensors:0.8", LoraChoice("wool", -0.5), "nano_2step_lora")
    request = Request("a fox", model="models/mine", loras=loras, engine="eager")
    assert request.loras == (
        LoraChoice("ink.safetensors", 0.8),
        LoraChoice("wool", -0.5),
        LoraChoice("nano_2step_lora"),
    )
    assert '"loras": ["ink.safetensors:0.8", "wool:-0.5", "nano_2step_lora"]' in request.to_json()
    assert Request.from_json(request.to_json()) == request


def test_json_without_a_model_is_read() -> None:
    read = Request.from_json('{"prompt": "a fox", "seed": 3}')
    assert read == Request("a fox", seed=3, model="nano", loras=(), engine="eager")


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("ink", "ink", 1.0),
        ("ink:0.8", "ink", 0.8),
        ("a:b/ink.safetensors:-.5", "a:b/ink.safetensors", -0.5),
        ("ink:", "ink:", 1.0),
        ("ink:0", "ink", 0.0),
        ("ink:0.00001", "ink", 1e-5),
    ],
)
def test_a_lora_is_read_with_its_weight(text: str, name: str, weight: float) -> None:
    choice = LoraChoice.parse(text)
    assert choice == LoraChoice(name, weight)
    assert LoraChoice.parse(str(choice)) == choice


def test_a_lora_has_a_finite_weight() -> None:
    with pytest.raises(RequestError, match="expected a finite one"):
        LoraChoice("ink", float("nan"))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"prompt": "a", "colour": 1}', '{"prompt": "a", "seed": -1}']
)
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        Request.from_json(text)
