"""Several processes on this machine's CPU, each told its rank as torchrun would, and what their
runs leave behind.
"""

import json
import multiprocessing
import os
import signal
import socket
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from twostep.cli import app

ROOT = Path(__file__).parents[2]
DRAWINGS = ROOT / "tests" / "pretrain" / "sample"
REGRESSION = {"name": "regression"}
CONDITIONAL = {"name": "adversarial", "objective": "conditional"}
UNCONDITIONAL = {"name": "adversarial", "objective": "unconditional"}
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

CLOCKS = {"time", "seconds_per_iteration"}
FORKS = multiprocessing.get_context("forkserver")
# What every process would import anew, which takes longer than what it then does.
FORKS.set_forkserver_preload(
    [
        "twostep.distill",
        "twostep.pretrain.latents",
        "twostep.data.cache",
        "accelerate",
        "tests.distill.killing",
    ]
)
WORK = """
import os, sys
file = os.open({output!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(file, 1), os.dup2(file, 2)
os.environ.update({environment!r})
{code}
"""
MODELS = """
import torch
from pathlib import Path
from twostep.pretrain.model import random_bundle

teacher, pupil = random_bundle(), random_bundle()
pupil.denoiser.network.requires_grad_(True)


class Source:
    def __init__(self, poisoned=None):
        self.calls, self.poisoned = 0, poisoned

    def draw(self, count, tensors, words):
        self.calls += 1
        conditioning = teacher.text.conditioning(["a red fox"] * count, 64, 64)
        if self.calls == self.poisoned:
            conditioning.text[-1] = float("nan")  # in the last process's share alone
        return torch.randn(count, 4, 16, 16, generator=tensors), conditioning

    def empty(self, like):
        return like


"""
COMMAND = "from twostep.cli import app; app({arguments!r})"


@dataclass(frozen=True)
class Launch:
    """Processes that run the same code, each told its rank as torchrun would, and where their
    output is.
    """

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

    def kill_at(self, log: Path, part: str, iteration: int, *, delay_seconds: float = 0.0) -> None:
        """Kill all as soon as the log has that iteration, or a moment later."""
        mark = f'"part": "{part}", "iteration": {iteration},'
        while not (log.exists() and mark in log.read_text()):
            assert all(process.is_alive() for process in self.processes), self.said()
            time.sleep(0.02)
        time.sleep(delay_seconds)
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        assert self.finish() == [-signal.SIGKILL] * len(self.processes)


def launch(code: str, folder: Path, *, count: int = 2) -> Launch:
    """Start `count` processes."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
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
    return ["distill", str(recipe), "--out", str(recipe.with_suffix(""))]


def distill(recipe: Path, *, count: int = 2) -> Launch:
    return launch(COMMAND.format(arguments=command(recipe)), recipe.parent / "said", count=count)


def write_recipe(
    folder: Path, model: Path, stages: list[dict[str, object]], **changes: object
) -> Path:
    values = {
        "model": str(model),
        "device": "cpu",
        "release": [4, 2],
        "sample_prompts": ["a red fox"],
    }
    values |= {
        "data": "twostep.pretrain.latents:builtin",
        "data_options": {"variants": 1, "drawings": str(DRAWINGS)},
    }
    folder.mkdir(exist_ok=True)
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps({**values, **changes, "defaults": SHARED, "stages": stages}))
    return path


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def figures(out: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the log says of every iteration, without clocks; of what was done twice, the last."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for line in lines(out):
        if "iteration" in line:
            key = (line.pop("part"), line.pop("iteration"))
            found.setdefault(key, {}).update(
                {name: line[name] for name in line if name not in CLOCKS}
            )
    return found


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What every finished stage kept."""
    paths = (out / "checkpoints").glob("*-finished.pt")
    return {path.stem: torch.load(path, weights_only=True)["weights"] for path in paths}


def run_chain(
    folder: Path, model: Path, stages: list[dict[str, object]], *, count: int = 2, **changes: object
) -> Path:
    """Distil by these stages and return the run's folder."""
    recipe = write_recipe(folder, model, stages, **changes)
    assert distill(recipe, count=count).succeed().count("written:") == 2
    assert [
        line["processes"] for line in lines(recipe.with_suffix("")) if line["part"] == "environment"
    ] == [count]
    return recipe.with_suffix("")


def check_same(
    alone: Path, together: Path, stages: list[dict[str, object]], *, of_norms: float = 1e-5
) -> None:
    """Compare figures and weights of one and the same chain by one process and by several; all but
    norms to 1e-5.
    """
    one, two = figures(alone), figures(together)
    num_iterations = sum(int((SHARED | stage)["iterations"]) for stage in stages)
    # Pictures are drawn before the first iteration too, where a stage asks for them.
    assert sum(iteration > 0 for _, iteration in one) == num_iterations
    assert one.keys() == two.keys()
    # Two are counts of signs: one logit near zero would tip them. Looks are of weights, compared
    # below, and so is what health says of them.
    counts = {"accuracy", "pairs_right"}
    left_out = counts | {"saturation", "contrast", "diversity", "trouble"}
    assert all(one[key].keys() == two[key].keys() for key in one)
    pairs = [
        (name, one[key][name], two[key][name]) for key in one for name in one[key].keys() - left_out
    ]
    for name, before, after in pairs:
        if isinstance(before, str):
            assert after == before, name
            continue
        assert after == pytest.approx(
            before, rel=of_norms if "grad_norm" in name else 1e-5, abs=1e-5
        ), name
    assert any(before != after for _, before, after in pairs), "both are the same run"
    # Adam turns rounding where a gradient is all but zero into steps of up to the rate.
    bound = 2 * num_iterations * SHARED["learning_rate"]
    expected, found = weights(alone), weights(together)
    assert len(expected) == len(stages)
    for name, kept in expected.items():
        off = torch.cat([(found[name][key] - value).flatten().abs() for key, value in kept.items()])
        assert off.max() < bound, name
        assert off.mean() < 1e-2 * SHARED["learning_rate"], name


def check_equal(one: Path, other: Path) -> None:
    """Compare two runs of the same chain by as many processes, bit for bit."""
    assert figures(one) == figures(other)
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(
        torch.equal(found[name][key], value)
        for name in expected
        for key, value in expected[name].items()
    )


def check_snapshots(out: Path, names: list[str]) -> None:
    """Compare snapshots after the last iteration with what the stages ended with, and export one.

    Args:
        out: the folder of a run.
        names: of the snapshots that there are, without their ending; those of LoRAs among them.
    """
    assert [path.stem for path in sorted((out / "snapshots").iterdir())] == names
    finished = weights(out)
    for name in names:
        stage = name.rpartition("-")[0]
        expected = finished[f"{stage}-finished"]
        found = load_file(out / "snapshots" / f"{name}.safetensors")
        prefix = "unet." if stage.endswith("-lora") else ""
        assert found.keys() == {f"{prefix}{key}" for key in expected}
        assert all(
            torch.equal(found[f"{prefix}{key}"], value.half()) for key, value in expected.items()
        )
        at = f"{stage}:{int(name.rpartition('-')[2])}"
        written = CliRunner().invoke(app, ["export", str(out), "--at", at])
        assert written.exit_code == 0, (written.output, written.exception)
        paths = [Path(line) for line in written.stdout.splitlines()]
        assert paths
        assert all(path.parent == out / "exports" / name and path.exists() for path in paths)
    assert not list(out.rglob("*.partial"))
