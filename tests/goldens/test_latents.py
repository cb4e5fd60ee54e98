"""Golden latents: every shipped model draws from fixed seeds what it drew when these were written
down.

`python -m tests.goldens.test_latents` writes them anew. Whoever does says in the commit why they
changed.
"""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.pipeline.generation import Progress, generate
from twostep.pipeline.request import Control, Picture, Request

GOLDEN = Path(__file__).with_name("latents.safetensors")
OPENMOJI = Path(__file__).parents[2] / "examples" / "openmoji"
TOLERANCE = 1e-3
"""Largest difference as a share of the latents' root mean square: a hundredth of what an eye sees,
a hundred roundings.
"""

PROMPT = "a 3d red apple on a blue background"


def load(name: str) -> Bundle:
    """Load a shipped model by what it is called below."""
    if name == "openmoji":
        return load_bundle(OPENMOJI)
    if name == "openmoji-nano_4step_lora":
        return load_with_loras(OPENMOJI, ["nano_4step_lora"])
    if name.endswith("lora"):
        return load_bundle(name)
    steps = int(name.removeprefix("nano-").removesuffix("step"))
    return load_bundle("nano", steps=steps)


def disc() -> Picture:
    """A white disc on black, for the ControlNet."""
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 24, 36, 56), fill="white")
    return Picture.of(image)


def request_for(name: str) -> Request:
    """What is asked of every model: two pictures from the same noise."""
    prompt = "a red apple on a blue background" if name.startswith("openmoji") else PROMPT
    return Request(prompt, num_images=2, seed=7)


def draw(bundle: Bundle, request: Request) -> Tensor:
    """Return the clean latents [2, 4, 16, 16] of a request."""
    seen: list[Tensor] = []

    def keep(progress: Progress) -> None:
        seen.append(progress.prediction.x0)

    generate(bundle, request, on_step=keep)
    return seen[-1].clone()


NAMES = (
    "nano-32step",
    "nano-8step",
    "nano-4step",
    "nano-2step",
    "nano-1step",
    "nano_8step_lora",
    "nano_4step_lora",
    "nano_2step_lora",
    "openmoji",
    "openmoji-nano_4step_lora",
)
CONTROLLED = ("nano-32step", "nano-4step")


def controlled(name: str) -> Tensor:
    """Return latents drawn with the shipped ControlNet."""
    request = Request(PROMPT, num_images=2, seed=7, controls=(Control(disc()),))
    return draw(load(name), request)


def assert_unchanged(found: Tensor, key: str) -> None:
    expected = load_file(GOLDEN)[key]
    difference = (found - expected).abs().max() / expected.square().mean().sqrt()
    assert difference <= TOLERANCE, f"{key}: latents differ by {difference:.2e} of their size"


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_what_they_were(name: str) -> None:
    assert_unchanged(draw(load(name), request_for(name)), name)


@pytest.mark.parametrize("name", CONTROLLED)
def test_latents_with_the_control_net_are_what_they_were(name: str) -> None:
    assert_unchanged(controlled(name), f"{name}-silhouette")


if __name__ == "__main__":
    latents = {name: draw(load(name), request_for(name)) for name in NAMES}
    latents |= {f"{name}-silhouette": controlled(name) for name in CONTROLLED}
    save_file({key: value.contiguous() for key, value in latents.items()}, GOLDEN)
