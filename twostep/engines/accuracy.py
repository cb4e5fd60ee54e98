"""How far an inexact engine's pictures are from those of PyTorch."""

from __future__ import annotations

import torch

from twostep.engines.errors import EngineError
from twostep.models.bundle import Bundle
from twostep.models.runtime import say
from twostep.models.sampling import decode, encode_prompts, sample_prompts

WARNING_LEVELS = 2.0
"""From this mean change of a pixel on, in levels of 255, whoever draws is told."""

MOST_LEVELS = 8.0
"""Beyond this mean change an engine does not draw with a model."""

PROMPTS = ("a red apple on a blue background", "a house beside a tree")
SEEDS = (0, 1)


def picture_change(exact: Bundle, other: Bundle, size: tuple[int, int]) -> float:
    """Return the mean change of a pixel between two bundles, in levels of 255.

    Both draw the same two prompts from the same noise.
    """
    pictures = []
    for bundle in (exact, other):
        with torch.inference_mode():
            guided = encode_prompts(exact, PROMPTS, size)
            latents = sample_prompts(bundle, guided, SEEDS, size)
            pictures.append(decode(exact, latents))
    first, second = pictures
    return float((first - second).abs().mean()) * 127.5


def judge_change(levels: float, engine: str, model: str) -> None:
    """Say that an engine changes a model's pictures, if it does.

    Raises EngineError where it changes them by more than `MOST_LEVELS`.
    """
    # Written so that NaN is refused as well.
    if not levels <= MOST_LEVELS:
        raise EngineError(
            f"{engine} changes a pixel of {model} by {levels:.1f} of 255 levels on average, and "
            f"{MOST_LEVELS:g} are allowed. Draw with openvino or eager."
        )
    if levels > WARNING_LEVELS:
        say(f"{engine} changes a pixel of {model} by {levels:.1f} of 255 levels on average.")
