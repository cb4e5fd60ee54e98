"""What an iteration of the trainer reads and copies, on nano, as torch's profiler sees it on a CPU.

    python benchmarks/trainer_profile.py

Where a number is read of a tensor that an accelerator computes, Python waits until all is done that
was queued before. A CPU has nothing to wait for, so what it reads is counted there and sorted:

- in the step of the optimiser: torch's fused AdamW on a CPU, whose counters of steps a GPU does not
  read;
- of times, which lie on the CPU whatever the device is;
- all others, each of which is a wait on an accelerator. Below the table stand their places.

Copies are all `aten::copy_`, conversions among them. One iteration is counted, after a first one.
"""

from __future__ import annotations

import argparse
import copy
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_overhead import random_source

import twostep
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.training.loop import Randomness

STAGES: dict[str, dict[str, Any]] = {
    "regression": {"method": {"name": "regression"}},
    "adversarial": {"method": {"name": "adversarial", "objective": "conditional"}},
    "lightning": {"method": {"name": "lightning", "objective": "conditional"}},
}

_PACKAGE = Path(twostep.__file__).parent

_OF_TIMES = "diffusion/"
"""Where in the package times are read; nothing else is read there."""


@dataclass(frozen=True)
class Counts:
    """What one iteration asked for.

    Args:
        operators: how often each was called, by torch's names.
        in_optimiser: reads in the steps of optimisers.
        places: lines of the package that read, and how often; those of optimisers not among them.
    """

    operators: Counter[str]
    in_optimiser: int
    places: Counter[str]

    @property
    def of_times(self) -> int:
        """Reads of times, which lie on the CPU."""
        return sum(count for at, count in self.places.items() if at.startswith(_OF_TIMES))

    @property
    def others(self) -> Counter[str]:
        """The places of all others, which would wait for an accelerator."""
        others = {at: count for at, count in self.places.items() if not at.startswith(_OF_TIMES)}
        return Counter(others)


class Reads(TorchDispatchMode):
    """Notes which line of the package reads a number of a tensor."""

    def __init__(self) -> None:
        """Have noted none."""
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, and note where it stands if it reads."""
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """Return the innermost line of the package that is being run, if there is one."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE).as_posix()}:{frame.lineno}: {frame.line}"
    return "outside the package"


def count(iterate: Callable[[], object]) -> Counts:
    """Let an iteration, and the next, be taken and counted: by the profiler, and by place."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        iterate()
    reads = Reads()
    with reads:
        iterate()
    events = [event for event in profiled.events() or () if event.name.startswith("aten::")]
    return Counts(
        operators=Counter(event.name for event in events),
        in_optimiser=sum(
            event.name == "aten::item" and _is_of_optimiser(event) for event in events
        ),
        places=reads.places,
    )


def _is_of_optimiser(event: Any) -> bool:
    return event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::_fused_adam")


def count_stage(settings: dict[str, Any], teacher: Bundle, batch: int) -> Counts:
    """Count an iteration of a stage of nano's 4-step student."""
    stage = Stage.model_validate(
        {
            "student_steps": 4,
            "teacher_steps": 8,
            "iterations": 3,
            "batch_size": batch,
            "learning_rate": 1e-5,
            "precision": "fp32",
            **settings,
        }
    )
    student = teacher.denoiser.with_network(copy.deepcopy(teacher.denoiser.network))
    student.network.requires_grad_(True)
    trainer = StageTrainer(stage, random_source(teacher), teacher.denoiser, student)
    numbers = iter(range(stage.iterations))

    def iterate() -> object:
        number = next(numbers)
        return trainer.iterate(number, Randomness.at(0, number))

    iterate()
    counts = count(iterate)
    trainer.remove_roles()
    return counts


def main() -> None:
    """Count every kind of stage and print a table, and the places of what would wait."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| an iteration of | all operators | `_to_copy` | `copy_` | `is_nonzero` | `item` "
        "| in the optimiser | of times | others |"
    )
    print("|---|" + "---:|" * 8)
    places = {}
    for name, settings in STAGES.items():
        teacher = load_bundle("nano")
        teacher.denoiser.network.requires_grad_(False).eval()
        counts = count_stage(settings, teacher, options.batch)
        calls = counts.operators
        columns = [calls.total()]
        columns += [calls[f"aten::{each}"] for each in ("_to_copy", "copy_", "is_nonzero", "item")]
        columns += [counts.in_optimiser, counts.of_times, counts.others.total()]
        print(f"| {name} | {' | '.join(f'{each:,}' for each in columns)} |", flush=True)
        places[name] = counts.others
    for name, found in places.items():
        print(f"\n{name}: " + ("nothing would wait" if not found else "what would wait"))
        for place, number in found.most_common():
            print(f"  {number} x {place}")


if __name__ == "__main__":
    main()
