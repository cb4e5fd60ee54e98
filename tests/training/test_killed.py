"""A training that is killed at any moment loses at most what came after its last checkpoint."""

import random
import time
from pathlib import Path

import pytest
import torch

from tests.distill.launching import FORKS
from twostep.training.checkpoints import read_checkpoint

TRAINING = """
import time
from pathlib import Path
import torch
from twostep.training.loop import LoopSettings, run_loop
from twostep.training.run_folder import RunFolder

class Weights:
    def __init__(self):
        self.values = torch.zeros(100_000)

    def state_dict(self):
        return {{"values": self.values}}

    def load_state_dict(self, state):
        self.values.copy_(state["values"])

def iterate(iteration, randomness):
    time.sleep(0.002)
    weights.values.add_(torch.rand(100_000, generator=randomness.tensors)).mul_(0.9)
    return {{"mean": weights.values.mean().item()}}

weights = Weights()
settings = LoopSettings(
    iterations=4000, batch_size=1, learning_rate=1.0, checkpoint_every=2, log_every=1
)
folder = RunFolder(Path({out!r}), settings)
run_loop(iterate, settings, folder, "x", {{"weights": weights}})
"""


def final_weights(out: Path) -> torch.Tensor:
    state = read_checkpoint(out / "checkpoints" / "x.pt")
    assert state["iteration"] == 4000
    weights: torch.Tensor = state["weights"]["values"]
    return weights


@pytest.mark.slow
def test_killed_forty_times_it_ends_bit_for_bit_where_it_would_have(tmp_path: Path) -> None:
    luck = random.Random(0)

    def start(out: Path) -> object:
        process = FORKS.Process(target=exec, args=(TRAINING.format(out=str(out)), {}))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    out = tmp_path / "killed"
    num_killed = 0
    while num_killed < 40:
        process = start(out)
        mark = (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0
        while process.is_alive():
            log = out / "log.jsonl"
            if log.exists() and log.stat().st_size > mark:
                break
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.1))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        num_killed += 1
    assert num_killed == 40
    last = start(out)
    last.join()
    assert last.exitcode == 0
    assert torch.equal(final_weights(out), final_weights(tmp_path / "whole"))
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert left == {"x.pt", "x.003998.pt"}
