"""Stopping a training at the end of an iteration: on a signal, or before a time limit."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from twostep.errors import TwostepError

OUT_OF_TIME = 75
"""The exit code of a command that stopped before its time limit: BSD's EX_TEMPFAIL, "try again"."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_SAFETY = 1.5
"""What comes next, an iteration with all that follows on it, may take this many times as long as
the longest of each so far."""


class StoppedError(TwostepError):
    """Training stopped because it was asked to, and the same command goes on.

    Attributes:
        exit_code: what the command shall end with: 128 and the number of the signal, or
            `OUT_OF_TIME`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Say where it stopped."""
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Whether a training is to stop after the iteration that it is at.

    Attributes:
        exit_code: of the command, once there is a reason to stop; 0 before.
    """

    def __init__(self, deadline: float | None) -> None:
        """Know of no reason to stop yet.

        Args:
            deadline: in seconds of `time.monotonic`; None for never.
        """
        self.deadline = deadline
        self.exit_code = 0
        self._longest: dict[str, float] = {}

    def took(self, what: str, seconds: float) -> None:
        """Take in how long something took: an "iteration", a "checkpoint", or what else is done."""
        self._longest[what] = max(self._longest.get(what, 0.0), seconds)

    def is_due(self) -> bool:
        """Return whether to stop now, because another iteration might come too late."""
        if self.deadline is not None and self.exit_code == 0:
            needed = _SAFETY * sum(self._longest.values())
            if time.monotonic() + needed > self.deadline:
                self.exit_code = OUT_OF_TIME
        return self.exit_code != 0

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal; the second one interrupts at once."""
        if self.exit_code != 0:
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        print("stopping after this iteration; once more to stop at once", file=sys.stderr)


@contextmanager
def stop_requests(deadline: float | None) -> Iterator[StopRequest]:
    """Listen for Ctrl-C and SIGTERM during the block, if it runs in the main thread."""
    request = StopRequest(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
