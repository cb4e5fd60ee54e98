"""A real model with random weights: quick, and as strict as a trained one where numbers are
compared.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle


def _as_student(teacher: Bundle, steps: int) -> Bundle:
    """The teacher's weights under a student's contract; one step predicts x0."""
    prediction_type = "x0" if steps == 1 else "eps"
    contract = replace(
        teacher.contract,
        name=f"random-{steps}step",
        role="student",
        steps=steps,
        trained_times=(250, 500, 750, 1000),
        guidance=1.0,
        prediction_type=prediction_type,
    )
    denoiser = replace(teacher.denoiser, prediction_type=prediction_type)
    return replace(teacher, contract=contract, denoiser=denoiser)


@pytest.fixture(scope="session")
def teacher() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="session")
def as_student() -> Callable[[Bundle, int], Bundle]:
    return _as_student


@pytest.fixture(scope="session")
def student(teacher: Bundle) -> Bundle:
    return _as_student(teacher, 4)
