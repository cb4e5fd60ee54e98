"""Every kind of training and of writing, killed at random moments, ends bit for bit where it would
have, and leaves nothing half done behind.
"""

import random
from pathlib import Path

import pytest

from .killing import KINDS, Killed, prepare

NUM_KILLS = 5
"""Of each kind. `python -m tests.distill --kills 40` takes as many as are wanted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all kinds read."""
    folder = tmp_path_factory.mktemp("killed")
    prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_it_ends_bit_for_bit_where_it_would_have(
    kind: str, folder: Path
) -> None:
    seed = random.SystemRandom().randrange(2**20)
    print(f"python -m tests.distill --kills {NUM_KILLS} --seed {seed} {kind}")
    Killed(kind, folder).under_fire(NUM_KILLS, random.Random(f"{seed} {kind}"))
