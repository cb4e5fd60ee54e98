"""Two processes on this machine's CPU train as one: same figures, same students, and whatever is
killed goes on.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .launching import (
    CONDITIONAL,
    MODELS,
    REGRESSION,
    ROOT,
    SHARED,
    UNCONDITIONAL,
    check_equal,
    check_same,
    check_snapshots,
    command,
    distill,
    launch,
    lines,
    run_chain,
    write_recipe,
)

LORA = {"lora_rank": 4, "gradient_checkpointing": True}
ON_SHARED_BASE = {"discriminator_lora": True}
# The penalty is of a difference of logits. With the noise of 0.05 that one trains with, they differ
# by 1e-2 at most, and their own rounding is then 2e-5 of it and of the gradient: a comparison to
# 1e-5 needs a difference ten times as large.
PENALIZED = {**UNCONDITIONAL, "r1_weight": 1.0, "perturbation": 0.5}
CHAIN = [
    {
        "student_steps": 16,
        "teacher_steps": 32,
        "guidance": 3.0,
        "method": {**REGRESSION, "reuse": 2},
        "snapshot_every": 3,
        "sample_every": 1,
    },
    {
        "student_steps": 8,
        "teacher_steps": 16,
        "method": {**CONDITIONAL, **ON_SHARED_BASE},
        **LORA,
        "snapshot_every": 3,
    },
    {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": {**UNCONDITIONAL, **ON_SHARED_BASE},
        **LORA,
    },
    {"student_steps": 4, "teacher_steps": 8, "method": CONDITIONAL},
    {"student_steps": 2, "teacher_steps": 8, "method": PENALIZED},
]
NAMES = [
    "16-regression",
    "8-adversarial-conditional-lora",
    "4-adversarial-unconditional-lora",
    "4-adversarial-conditional",
    "2-adversarial-unconditional",
]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as one process runs it."""
    return run_chain(tmp_path_factory.mktemp("alone"), model, CHAIN, count=1)


@pytest.fixture(scope="module")
def together(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as two processes run it, each on half of every batch."""
    return run_chain(tmp_path_factory.mktemp("together"), model, CHAIN)


@pytest.mark.slow
def test_two_processes_with_half_the_batch_each_give_what_one_gives(
    alone: Path, together: Path
) -> None:
    check_same(alone, together, CHAIN)


@pytest.mark.slow
def test_snapshots_of_two_processes_are_whole_and_exported(together: Path) -> None:
    check_snapshots(together, ["16-regression-000003", "8-adversarial-conditional-lora-000003"])


@pytest.mark.slow
def test_killed_somewhere_in_every_stage_one_gives_what_it_would_have(
    alone: Path, model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model, CHAIN)
    out, chance = recipe.with_suffix(""), random.Random()
    for name in NAMES:
        # The second iteration keeps a checkpoint: a moment later it may be half written.
        iteration, delay = chance.choice((1, 2)), chance.random() / 5
        print(f"killed {delay:.3f} s after iteration {iteration} of {name}")
        distill(recipe, count=1).kill_at(out / "log.jsonl", name, iteration, delay_seconds=delay)
    distill(recipe, count=1).succeed()
    check_equal(out, alone)


@pytest.mark.slow
def test_killed_and_run_again_they_give_what_they_would_have(
    together: Path, model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model, CHAIN)
    out = recipe.with_suffix("")
    distill(recipe).kill_at(out / "log.jsonl", "8-adversarial-conditional-lora", 3)
    kept = torch.load(out / "checkpoints" / "8-adversarial-conditional-lora.pt", weights_only=True)
    assert kept["iteration"] in (2, 3)
    assert not (out / "checkpoints" / "8-adversarial-conditional-lora-finished.pt").exists()
    distill(recipe).succeed()
    check_equal(out, together)


POISONED = """
from twostep.distill.recipe import Stage
from twostep.distill.trainer import train_stage
from twostep.training.processes import joined
from twostep.training.run_folder import RunFolder
from twostep.training.loop import TrainingError

stage = Stage.model_validate({stage!r})
with joined(torch.device("cpu")):
    folder = RunFolder(Path({out!r}), stage)
    try:
        train_stage(stage, Source(4), teacher.denoiser, pupil.denoiser, folder)
    except TrainingError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_is_no_number_in_one_process_stops_all(tmp_path: Path) -> None:
    stage = {
        **SHARED,
        "iterations": 6,
        "student_steps": 4,
        "teacher_steps": 8,
        "method": CONDITIONAL,
    }
    both = launch(
        (MODELS + POISONED)
        .replace("{stage!r}", repr(stage))
        .replace("{out!r}", repr(str(tmp_path / "run"))),
        tmp_path,
    )
    assert both.finish() == [0, 0], both.said()
    assert all(
        "discriminator loss is nan at iteration 3. The last checkpoint is whole" in said
        for said in both.said()
    )
    path = tmp_path / "run" / "checkpoints" / "4-adversarial-conditional.pt"
    kept = torch.load(path, weights_only=True)
    assert kept["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in kept["student"].values())


@pytest.mark.slow
def test_torchrun_starts_it_and_the_first_process_writes(model: Path, tmp_path: Path) -> None:
    stage = {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": REGRESSION,
        "iterations": 1,
        "batch_size": 2,
    }
    recipe = write_recipe(tmp_path, model, [stage], release=[4])
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "twostep",
    ]
    line = [sys.executable, *torchrun, *command(recipe)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    log = lines(recipe.with_suffix(""))
    # Each is there once: the second process writes nothing.
    for part, figure in (
        ("environment", "processes"),
        ("probe", None),
        ("4-regression", "student_loss"),
        ("4-regression", "saturation"),
    ):
        found = [line for line in log if line["part"] == part and (not figure or figure in line)]
        assert len(found) == 1, (part, found)
    assert log[0]["processes"] == 2


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_alike_is_told(model: Path, tmp_path: Path) -> None:
    stage = {"student_steps": 4, "teacher_steps": 8, "method": REGRESSION, "batch_size": 3}
    both = distill(write_recipe(tmp_path, model, [stage], release=[4]))
    assert both.finish() == [1, 1]
    assert all(
        "4-regression has batch_size 3, which 2 processes cannot share alike" in said
        for said in both.said()
    )
