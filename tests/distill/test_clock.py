"""The chain's clock: the time that is left, also of stages that have not begun."""

import time

import pytest

from twostep.distill.clock import ChainClock, duration, progress_line

from .test_trainer import CONDITIONAL, REGRESSION, make_stage


def test_stages_to_come_are_told_by_what_their_iterations_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression takes 4 teacher steps with guidance and one turn: 8 + 3 passes of an example.

    The adversarial stage takes 2 steps without, and two turns: 2 + 6, of twice as many examples.
    """
    first = make_stage(
        method=REGRESSION, teacher_steps=16, guidance=3.0, iterations=20, batch_size=2
    )
    second = make_stage(method=CONDITIONAL, iterations=10, batch_size=4)
    clock = ChainClock((first, second))
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert clock.seconds_left(first, 0) is None
    for num_done in range(6, 9):
        clock.tick(first, num_done)
        now += 0.5
    # 0.5 s for 2 * 11 passes; 12 iterations of those, and 10 of 4 * 8.
    expected = 12 * 0.5 + 10 * 0.5 * 32 / 22
    assert clock.seconds_left(first, 8) == pytest.approx(expected)
    assert clock.seconds_left(second, 4) == pytest.approx(6 * 0.5 * 32 / 22)
    now += 3600  # between the stages something else may be done
    clock.tick(second, 1)
    assert clock.seconds_left(first, 8) == pytest.approx(expected)


def test_a_line_says_stage_pace_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage(method=REGRESSION, iterations=300)
    clock = ChainClock((stage,))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for num_done in (49, 50):
        clock.tick(stage, num_done)
        now += 2.0
    logged = {"part": "4-regression", "iteration": 50, "student_loss": 0.01234567}
    logged["seconds_per_iteration"] = 1.98765
    assert progress_line(clock, logged) == (
        "4-regression 50/300, 1.99 s each, chain 8 min left: student_loss 0.01235"
    )
    assert progress_line(clock, {"part": "environment", "machine": "a"}) is None
    assert progress_line(clock, {"part": "4-regression", "iteration": 50, "contrast": 1.0}) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599.0, "1 h 0 min"),
        (3600.0, "1 h 0 min"),
        (12_000.0, "3 h 20 min"),
        (190_800.0, "2 d 5 h"),
    ],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
