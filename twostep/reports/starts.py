"""How long a drawing takes from cold, and how much memory: each in a process of its own.

Everything takes turns, as in `speed`. Beside the engines stands `import torch` alone, which is what
a start is compared with: it is as slow as the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from twostep.reports.speed import PROMPT, Case, SpeedError, Timing

TORCH = "import torch"
"""The name of a process that does nothing but this."""

_LAUNCHER = """
import os, sys, time
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
start = time.perf_counter()
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, usage = os.wait4(process, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""
"""Starts a command from a small process: Linux counts what starts a process as its memory too."""

_BYTES_OF_MAXRSS = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Start:
    """Processes that drew once and ended: their seconds, and the most memory of one in bytes."""

    name: str
    case: Case
    seconds: Timing
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "steps": self.case.steps,
            "size": list(self.case.size),
            "batch": self.case.batch,
            "rounds": len(self.seconds.seconds),
            "seconds": self.seconds.as_json(),
            "peak_bytes": self.peak_bytes,
        }

    def times_as_long_as(self, other: Start) -> Timing:
        """Return how many times as long this took as another, round by round."""
        pairs = zip(self.seconds.seconds, other.seconds.seconds, strict=True)
        return Timing(tuple(ours / theirs for ours, theirs in pairs))


def time_starts(
    model: str,
    *,
    engines: Sequence[str],
    cases: Sequence[Case],
    rounds: int,
    on_case: Callable[[Case], None] | None = None,
) -> list[Start]:
    """Time `twostep generate` from cold with every engine in every case, and `import torch`.

    Before, each engine draws once, so that what it keeps on the disk is there.

    Args:
        model: A built-in name, a folder, a file or a hub id.
        engines: Their names.
        cases: What is drawn.
        rounds: Processes of each that count.
        on_case: Called before each case.

    Raises:
        SpeedError: A command fails, with its last line.
    """
    starts = []
    for case in cases:
        if on_case is not None:
            on_case(case)
        with TemporaryDirectory() as folder:
            commands = {name: _generate(model, name, case, Path(folder)) for name in engines}
            for command in commands.values():
                _run(command)
            commands = {TORCH: [sys.executable, "-c", "import torch"], **commands}
            taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name, command in commands.items():
                    taken[name].append(_run(command))
        for name, runs in taken.items():
            seconds = Timing(tuple(each for each, _ in runs))
            starts.append(Start(name, case, seconds, max(peak for _, peak in runs)))
    return starts


def _generate(model: str, engine: str, case: Case, folder: Path) -> list[str]:
    """Return the command that draws a case."""
    width, height = case.size
    settings = {
        "--model": model,
        "--engine": engine,
        "--steps": case.steps,
        "--size": f"{width}x{height}",
        "--num-images": case.batch,
        "--out": folder,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return [sys.executable, "-m", "twostep", "generate", PROMPT, *words]


def _run(command: Sequence[str]) -> tuple[float, int]:
    """Return the seconds of a command, an executable's path first, and its most memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command],
        env={**os.environ, "TWOSTEP_SERVER": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, most, code = done.stdout.split()
    if int(code) != 0:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise SpeedError(f"`{' '.join(command[1:4])} ...` failed: {last}")
    return float(seconds), int(most) * _BYTES_OF_MAXRSS
