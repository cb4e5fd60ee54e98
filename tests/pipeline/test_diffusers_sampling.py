"""The same prompt, seed and steps give the latents that vanilla diffusers gives.

diffusers starts from 0.99767 times the noise where we start from the noise itself, so it is handed
noise divided by that; everything after the start is then one and the same flow.
"""

from collections.abc import Callable

import pytest
import torch

from twostep.diffusion import initial_noise
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request

from ..vanilla import assemble

PROMPT = "a 3d red apple on a blue background"
SEED = 11


def vanilla(
    bundle: Bundle, steps: int, guidance: float, *, corrected_start: bool = True
) -> torch.Tensor:
    """Sample with StableDiffusionXLPipeline as its users would: Euler, trailing, with guidance."""
    prediction_type = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[
        bundle.denoiser.prediction_type
    ]
    pipeline = assemble(bundle, timestep_spacing="trailing", prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(SEED, bundle.latent_shape(64, 64))[None]
    top = pipeline.scheduler.sigmas.max()
    start = top / (top**2 + 1).sqrt()
    assert start.item() == pytest.approx(0.99767, abs=1e-5)
    return pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise / start if corrected_start else noise,
        width=64,
        height=64,
        output_type="latent",
    ).images[0]


def ours(bundle: Bundle, steps: int, guidance: float | None = None) -> torch.Tensor:
    foreseen: list[torch.Tensor] = []
    request = Request(PROMPT, seed=SEED, steps=steps, guidance=guidance)
    generate(bundle, request, on_step=lambda progress: foreseen.append(progress.prediction.x0[0]))
    return foreseen[-1]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_students_match(
    teacher: Bundle, as_student: Callable[[Bundle, int], Bundle], steps: int
) -> None:
    student = as_student(teacher, steps)
    assert relative_difference(ours(student, steps), vanilla(student, steps, 0.0)) < 1e-4


@pytest.mark.parametrize("steps", [4, 32])
def test_guided_teacher_matches(teacher: Bundle, steps: int) -> None:
    assert relative_difference(ours(teacher, steps, 4.0), vanilla(teacher, steps, 4.0)) < 1e-4


def test_the_start_is_the_only_difference(student: Bundle) -> None:
    difference = relative_difference(
        ours(student, 4), vanilla(student, 4, 0.0, corrected_start=False)
    )
    assert 1e-4 < difference < 1e-2
