"""Two processes on this machine's CPU train as one: same figures, same students, and whatever is killed goes on."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import tomli_w
import torch

from twostep.models.bundle import save_bundle
from twostep.models.nano import random_bundle

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "tests" / "data" / "emoji_sample.safetensors"
SHARED = {
    "iterations": 3,
    "batch_size": 4,
    "learning_rate": 1e-5,
    "warmup_iterations": 1,
    "checkpoint_every": 2,
    "log_every": 1,
    "precision": "fp32",
    "ema_decay": 0.5,
}
LORA = {"lora_rank": 4, "discriminator_lora": True, "gradient_checkpointing": True}
CHAIN = [
    {"student_steps": 16, "teacher_steps": 32, "objective": "mse", "guidance": 3.0, "reuse": 2},
    {"student_steps": 8, "teacher_steps": 16, "objective": "conditional", **LORA},
    {"student_steps": 4, "teacher_steps": 8, "objective": "unconditional", **LORA},
    {"student_steps": 4, "teacher_steps": 8, "objective": "conditional"},
    {"student_steps": 2, "teacher_steps": 8, "objective": "unconditional", "r1_weight": 100.0},
]

CLOCKS = {"time", "seconds_per_iteration"}
FORKS = multiprocessing.get_context("forkserver")
# What every process would import anew, which takes longer than what it then does.
FORKS.set_forkserver_preload(["twostep.distill", "twostep.data.source", "twostep.data.cache", "accelerate"])
WORK = """
import os, sys
file = os.open({output!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1), os.dup2(file, 2)
os.environ.update({environment!r})
{code}
"""
COMMAND = "from twostep.cli import app; app({arguments!r})"


@dataclass(frozen=True)
class Launch:
    """Processes that run the same code, each told its rank as torchrun would, and where their output is."""

    processes: list[ForkServerProcess]
    outputs: list[Path]

    def finish(self) -> list[int]:
        """Return the exit codes."""
        for process in self.processes:
            process.join(timeout=1800)
        return [process.exitcode for process in self.processes]

    def succeed(self) -> str:
        """Return what the first process said; the others name no file."""
        assert self.finish() == [0] * len(self.processes), self.said()
        first, *others = self.said()
        assert not any("written" in said for said in others)
        return first

    def said(self) -> list[str]:
        return [path.read_text() for path in self.outputs]

    def kill_at(self, log: Path, part: str, iteration: int) -> None:
        """Kill all as soon as the log has that iteration."""
        mark = f'"part": "{part}", "iteration": {iteration},'
        while not (log.exists() and mark in log.read_text()):
            assert all(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.02)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        assert self.finish() == [-signal.SIGKILL] * len(self.processes)


def launch(code: str, folder: Path, *, count: int = 2) -> Launch:
    """Start `count` processes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    told |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"{i}.txt" for i in range(count)]
    processes = []
    for i, output in enumerate(outputs):
        environment = {**told, "RANK": str(i), "LOCAL_RANK": str(i)}
        work = WORK.format(output=str(output), environment=environment, code=code)
        processes.append(FORKS.Process(target=exec, args=(work, {}), daemon=True))
        processes[-1].start()
    return Launch(processes, outputs)


def command(recipe: Path) -> list[str]:
    """What distils by this recipe into the folder beside it."""
    return ["distill", str(recipe), "--out", str(recipe.with_suffix("")), "--emoji", str(EMOJI)]


def distill(recipe: Path, *, count: int = 2) -> Launch:
    return launch(COMMAND.format(arguments=command(recipe)), recipe.parent / "said", count=count)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher with random weights that draws in few steps."""
    folder, teacher = tmp_path_factory.mktemp("model"), random_bundle()
    save_bundle(replace(teacher, contract=replace(teacher.contract, steps=2)), folder)
    return folder


def write_recipe(folder: Path, model: Path, phases: list[dict[str, object]], **changes: object) -> Path:
    values = {"model": str(model), "device": "cpu", "variants": 1, "release": [4, 2], "sample_prompts": ["a red fox"]}
    folder.mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({**values, **changes, "phases": [SHARED | phase for phase in phases]}))
    return path


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def figures(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the log says of every iteration, without clocks; of what was done twice, the last."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines(out):
        if "iteration" in line:
            key = (line.pop("part"), line.pop("iteration"))
            found.setdefault(key, {}).update({name: line[name] for name in line if name not in CLOCKS})
    return found


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What every finished phase kept."""
    paths = (out / "checkpoints").glob("*-finished.pt")
    return {path.stem: torch.load(path, weights_only=True)["weights"] for path in paths}


def run_chain(folder: Path, model: Path, *, count: int) -> Path:
    recipe = write_recipe(folder, model, CHAIN)
    assert distill(recipe, count=count).succeed().count("written:") == 2
    assert [line["processes"] for line in lines(recipe.with_suffix("")) if line["part"] == "environment"] == [count]
    return recipe.with_suffix("")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as one process runs it."""
    return run_chain(tmp_path_factory.mktemp("alone"), model, count=1)


@pytest.fixture(scope="module")
def together(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as two processes run it, each on half of every batch."""
    return run_chain(tmp_path_factory.mktemp("together"), model, count=2)


def test_two_processes_with_half_the_batch_each_give_what_one_gives(alone: Path, together: Path) -> None:
    one, two = figures(alone), figures(together)
    assert len(one) == SHARED["iterations"] * len(CHAIN)
    assert one.keys() == two.keys()
    # The accuracy is a count of signs: one logit near zero would tip it. Looks are of weights, compared below.
    left_out = {"accuracy", "saturation", "contrast", "diversity"}
    assert all(one[key].keys() == two[key].keys() for key in one)
    pairs = [(one[key][name], two[key][name]) for key in one for name in one[key].keys() - left_out]
    assert all(after == pytest.approx(before, rel=1e-5, abs=1e-5) for before, after in pairs)
    assert any(before != after for before, after in pairs), "both are the same run"
    # Adam turns rounding where a gradient is all but zero into steps of up to the rate.
    bound = 2 * SHARED["iterations"] * len(CHAIN) * SHARED["learning_rate"]
    expected, found = weights(alone), weights(together)
    assert len(expected) == len(CHAIN)
    for name, kept in expected.items():
        off = torch.cat([(found[name][key] - value).flatten().abs() for key, value in kept.items()])
        assert off.max() < bound, name
        assert off.mean() < 1e-2 * SHARED["learning_rate"], name


def test_killed_and_run_again_they_give_what_they_would_have(together: Path, model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model, CHAIN)
    out = recipe.with_suffix("")
    distill(recipe).kill_at(out / "log.jsonl", "8-conditional-lora", 3)
    kept = torch.load(out / "checkpoints" / "8-conditional-lora.pt", weights_only=True)
    assert kept["iteration"] in (2, 3)
    assert not (out / "checkpoints" / "8-conditional-lora-finished.pt").exists()
    distill(recipe).succeed()
    assert figures(out) == figures(together)
    expected, found = weights(together), weights(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name][key], value) for name in expected for key, value in expected[name].items())


POISONED = """
import torch
from pathlib import Path
from twostep.distill.recipe import Phase
from twostep.distill.trainer import Lesson, train_phase
from twostep.models.nano import random_bundle
from twostep.runs.devices import joined
from twostep.runs.folder import RunFolder
from twostep.runs.loop import TrainingError

teacher, pupil = random_bundle(), random_bundle()
pupil.denoiser.network.requires_grad_(True)


class Source:
    calls = 0

    def draw(self, count, tensors, words):
        self.calls += 1
        conditioning = teacher.text.conditioning(["a red fox"] * count, 64, 64)
        if self.calls == 4:
            conditioning.text[-1] = float("nan")  # in the last process's share alone
        return torch.randn(count, 4, 16, 16, generator=tensors), conditioning

    def empty(self, like):
        return like


phase = Phase.model_validate({phase!r})
with joined(torch.device("cpu")):
    try:
        train_phase(phase, Lesson(Source(), teacher.denoiser, pupil.denoiser), RunFolder(Path({out!r}), phase))
    except TrainingError as error:
        print(error)
"""


def test_what_is_no_number_in_one_process_stops_all(tmp_path: Path) -> None:
    phase = {**SHARED, "iterations": 6, "student_steps": 4, "teacher_steps": 8, "objective": "conditional"}
    both = launch(POISONED.replace("{phase!r}", repr(phase)).replace("{out!r}", repr(str(tmp_path / "run"))), tmp_path)
    assert both.finish() == [0, 0], both.said()
    assert all("discriminator loss is nan at iteration 3. The last checkpoint is whole" in said for said in both.said())
    kept = torch.load(tmp_path / "run" / "checkpoints" / "4-conditional.pt", weights_only=True)
    assert kept["iteration"] == 2
    assert all(torch.isfinite(value).all() for value in kept["student"].values())


def test_torchrun_starts_it_and_the_first_process_writes(model: Path, tmp_path: Path) -> None:
    phase = {"student_steps": 4, "teacher_steps": 8, "objective": "mse", "iterations": 1, "batch_size": 2}
    recipe = write_recipe(tmp_path, model, [phase], release=[4])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "twostep"]
    line = [sys.executable, *torchrun, *command(recipe)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    log = lines(recipe.with_suffix(""))
    assert [line["part"] for line in log] == ["environment", "probe", "4-mse", "4-mse"]
    assert "loss" in log[2] and "diversity" in log[3]
    assert log[0]["processes"] == 2


def test_a_batch_that_cannot_be_shared_alike_is_told(model: Path, tmp_path: Path) -> None:
    phase = {"student_steps": 4, "teacher_steps": 8, "objective": "mse", "batch_size": 3}
    both = distill(write_recipe(tmp_path, model, [phase], release=[4]))
    assert both.finish() == [1, 1]
    assert all("4-mse has batch_size 3, which 2 processes cannot share alike" in said for said in both.said())
