"""A real model with random weights: quick, and as strict as a trained one where numbers are
compared.
"""

from collections.abc import Callable

import pytest

from tests import students
from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle


@pytest.fixture(scope="session")
def teacher() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="session")
def as_student() -> Callable[[Bundle, int], Bundle]:
    return students.as_student


@pytest.fixture(scope="session")
def student(teacher: Bundle) -> Bundle:
    return students.as_student(teacher, 4)
