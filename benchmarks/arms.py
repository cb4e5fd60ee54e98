"""What benchmarks that compare trainings have in common: counting iterations, a process for each
training, and saying how far the teacher is."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from twostep.distill.trainer import train_stage


def train_and_count(*args: Any, **settings: Any) -> int:
    """Train a stage as `train_stage` does; return how many iterations its time was enough for."""
    done = 0

    def count(iteration: int, figures: Any) -> None:
        nonlocal done
        done = iteration

    train_stage(*args, **settings, on_iteration=count)
    return done


def run_apart(name: str, job: str) -> None:
    """Run this script once more for one job, in a process of its own; say so if it fails."""
    if subprocess.run([sys.executable, *sys.argv, "--job", job]).returncode:
        print(f"{name} failed", flush=True)


def print_progress(done: int, total: int | None, words: str) -> None:
    """Say what is done, now and then."""
    if done % 16 == 0:
        print(f"{done} of {total} {words}", flush=True)
