"""How long a chain will still take, by the pace of what was trained so far.

Stages that have not begun have no pace yet. Theirs is that of the stages so far, scaled by what an
iteration computes: calls of the teacher, and forward and backward passes of what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from twostep.distill.recipe import TrainedStage
from twostep.training.run_log import SECONDS

_PASSES_OF_A_TURN = 3
"""A forward and a backward pass cost about three forward passes."""

_ITERATIONS_LOOKED_AT = 60
"""Turns may come in a pattern; this many iterations show how many there are on average."""

_SHARE_OF_NEWEST = 0.02
"""How much of the pace is the newest iteration's: about the last fifty count."""


class ChainClock:
    """Times the iterations of a chain.

    Attributes:
        stages: of the chain, in order.
    """

    def __init__(self, stages: Sequence[TrainedStage]) -> None:
        """Know of no pace yet."""
        self.stages = stages
        self._work = {stage.name: _work(stage) for stage in stages}
        self._last_at: float | None = None
        self._last: tuple[str, int] | None = None
        self._seconds_per_work: float | None = None

    def tick(self, stage: TrainedStage, num_done: int) -> None:
        """Take in that an iteration of a stage is done, with whatever came before it."""
        now = time.monotonic()
        if self._last_at is not None and self._last == (stage.name, num_done - 1):
            pace = (now - self._last_at) / self._work[stage.name]
            if self._seconds_per_work is None:
                self._seconds_per_work = pace
            else:
                self._seconds_per_work += _SHARE_OF_NEWEST * (pace - self._seconds_per_work)
        self._last_at = now
        self._last = (stage.name, num_done)

    def seconds_left(self, stage: TrainedStage, num_done: int) -> float | None:
        """Return how long this stage and those after it will take; None while there is no pace."""
        if self._seconds_per_work is None:
            return None
        position = next(i for i, other in enumerate(self.stages) if other.name == stage.name)
        work = (stage.iterations - num_done) * self._work[stage.name]
        work += sum(
            later.iterations * self._work[later.name] for later in self.stages[position + 1 :]
        )
        return work * self._seconds_per_work


def duration(seconds: float) -> str:
    """Return a time in words, as in "45 s", "12 min", "3 h 20 min" or "2 d 5 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def progress_line(clock: ChainClock, logged: Mapping[str, Any]) -> str | None:
    """Return a line for people on what was logged of a stage's iterations; None of anything else.

    As in "4-regression 50/300, 1.2 s each, chain 7 min: student_loss 0.0123".
    """
    stage = next((stage for stage in clock.stages if stage.name == logged["part"]), None)
    if stage is None or SECONDS not in logged:
        return None
    num_done = logged["iteration"]
    left = clock.seconds_left(stage, num_done)
    chain = "" if left is None else f", chain {duration(left)} left"
    figures = " ".join(
        f"{key} {value:.4g}"
        for key, value in logged.items()
        if isinstance(value, float) and key != SECONDS
    )
    pace = f"{logged[SECONDS]:.3g} s each"
    return f"{stage.name} {num_done}/{stage.iterations}, {pace}{chain}: {figures}"


def _work(stage: TrainedStage) -> float:
    """Return what an iteration computes, in forward passes of one example."""
    method = stage.make_method()
    num_turns = sum(len(method.turns(i)) for i in range(_ITERATIONS_LOOKED_AT))
    passes = _PASSES_OF_A_TURN * num_turns / _ITERATIONS_LOOKED_AT
    return stage.batch_size * (method.cost().teacher_evaluations + passes)
