"""The model of clips in twostep-media: what it says of itself, and that things go as told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twostep.evaluate.tracking import motion_figures, motion_kinds, track
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio

NANO_MOTION = Path(__file__).parents[2] / "distributions/media/twostep_media/nano-motion"
SIZE = (64, 64)


def test_words_of_motion_are_known_to_it_and_others_are_not() -> None:
    studio = Studio("cpu")
    moved = Request("a red apple, moving left", model=str(NANO_MOTION), steps=2, frames=2)
    assert "vocabulary" not in " ".join(studio.draw(moved).warnings)
    warnings = studio.draw(replace(moved, prompt="a red apple, yodelling")).warnings
    assert "not in the vocabulary of nano-motion-2step: yodelling" in " ".join(warnings)


@pytest.mark.parametrize("steps", [None, 8, 4, 2])
def test_watermelons_go_where_they_are_told(steps: int | None) -> None:
    bundle = load_bundle(NANO_MOTION, steps=steps)
    role = "teacher" if steps is None else "student"
    assert (bundle.contract.role, bundle.contract.media) == (role, "video")
    kinds = {"left": "moving left", "right": "moving right", "up": "moving up", "grow": "growing"}
    prompts = [f"a 3d watermelon on a blue background, {words}" for words in kinds.values()]
    how = {"steps": 8, "sampler": "dpmpp-2m"} if steps is None else {}
    with torch.no_grad():
        guided = encode_prompts(bundle, prompts, SIZE)
        # The same noise for all of them: only the words differ.
        latents = sample_prompts(bundle, guided, [5] * 4, SIZE, **how)
        clips = decode(bundle, latents)
    assert clips.shape == (4, 3, 16, *SIZE)
    assert motion_kinds(motion_figures(track(clips))) == list(kinds)
