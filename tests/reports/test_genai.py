"""OpenVINO GenAI reads what is written for it, and draws the same picture."""

from pathlib import Path

import numpy as np
import pytest

from twostep.models.loading import load_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.reports.genai import guidance_of, open_pipeline, write_folder

PROMPT = "a 3d red apple on a blue background"


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "batch"), [(2, 1), (1, 2), (None, 1)])
def test_it_draws_the_same_picture(steps: int | None, batch: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino_genai")
    bundle = load_bundle("nano", steps=steps)
    bundle = bundle if steps else bundle.as_teacher()
    shape = {"size": (64, 64), "batch": batch}
    write_folder(bundle, tmp_path, **shape)
    guidance = guidance_of(bundle)
    assert (guidance > 1) == (steps is None)
    draw = open_pipeline(tmp_path, {"INFERENCE_PRECISION_HINT": "f32"}, **shape, guidance=guidance)
    count = steps or 4
    theirs = draw(PROMPT, 3, count)
    assert theirs.shape == (batch, 64, 64, 3)
    request = Request(PROMPT, seed=3, steps=count, guidance=guidance)
    ours = np.asarray(generate(bundle, request).images[0])
    difference = theirs[0].astype(int) - ours.astype(int)
    # It cuts fractions of a level off, where we round: half a level on average.
    # Guidance multiplies what is left between two runtimes.
    assert np.abs(difference).max() <= (3 if steps else 6)
    assert difference.mean() == pytest.approx(-0.5, abs=0.1)
