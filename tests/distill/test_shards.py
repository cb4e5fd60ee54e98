"""Two processes that hold half of every weight each train as one that holds all, and whatever is
killed goes on.
"""

import shutil
from pathlib import Path

import pytest
import torch

import twostep
from twostep.pretrain.model import random_bundle
from twostep.training.optimiser import SHARDED_OPTIMISERS

from .launching import (
    CONDITIONAL,
    MODELS,
    REGRESSION,
    SHARED,
    UNCONDITIONAL,
    check_equal,
    check_same,
    check_snapshots,
    distill,
    launch,
    run_chain,
    weights,
    write_recipe,
)

ONCE = {"iterations": 1}
SNAPSHOTS = {"snapshot_every": 1, "sample_every": 1}
CHAIN = [
    {
        "student_steps": 8,
        "teacher_steps": 16,
        "method": REGRESSION,
        "guidance": 3.0,
        **ONCE,
        **SNAPSHOTS,
    },
    {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": {**CONDITIONAL, "discriminator_lora": True},
        "lora_rank": 4,
        **ONCE,
        **SNAPSHOTS,
    },
    {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": UNCONDITIONAL,
        "gradient_checkpointing": True,
        **ONCE,
    },
    {
        "student_steps": 2,
        "teacher_steps": 4,
        "method": {**CONDITIONAL, "r1_weight": 1.0},
        "snapshot_every": 3,
    },
]
SNAPSHOT_NAMES = [
    "2-adversarial-conditional-000003",
    "4-adversarial-conditional-lora-000001",
    "8-regression-000001",
]


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain as two processes run it that share weights and batches."""
    return run_chain(tmp_path_factory.mktemp("sharded"), model, CHAIN, shard=True)


@pytest.mark.slow
def test_two_processes_with_half_the_weights_each_give_what_one_gives(
    sharded: Path, model: Path, tmp_path: Path
) -> None:
    # The float32 norm of a whole tensor is off by 1.6e-5 from that in float64, the norm of its
    # shards by less.
    check_same(run_chain(tmp_path, model, CHAIN, count=1), sharded, CHAIN, of_norms=5e-5)


@pytest.mark.slow
def test_killed_and_run_again_they_give_what_they_would_have(
    sharded: Path, model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model, CHAIN, shard=True)
    # Only the last stage is done again; what the others have finished is taken over.
    shutil.copytree(sharded, recipe.with_suffix(""))
    checkpoints = recipe.with_suffix("") / "checkpoints"
    for path in checkpoints.glob("2-adversarial-conditional*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = recipe.with_suffix("") / "log.jsonl"
    log.write_text(
        "".join(
            line
            for line in log.read_text().splitlines(True)
            if '"2-adversarial-conditional"' not in line
        )
    )
    distill(recipe).kill_at(log, "2-adversarial-conditional", 3)
    kept = torch.load(checkpoints / "2-adversarial-conditional.pt", weights_only=True)
    assert kept["iteration"] in (2, 3)
    assert kept["student"]["conv_in.weight"].is_meta, "the shards are elsewhere"
    assert (
        checkpoints / f"2-adversarial-conditional.{kept['iteration']}.shards" / ".metadata"
    ).exists()
    assert not (checkpoints / "2-adversarial-conditional-finished.pt").exists()
    distill(recipe).succeed()
    # Finished stages keep their weights alone, which are whole.
    assert list(checkpoints.glob("*.shards")) == []
    check_equal(recipe.with_suffix(""), sharded)


@pytest.mark.slow
def test_what_they_release_is_whole(sharded: Path) -> None:
    student = twostep.load(sharded / "model", steps=4)
    finished = weights(sharded)["4-adversarial-unconditional-finished"]
    own = student.denoiser.network.state_dict()
    assert own.keys() == finished.keys()
    assert all(torch.equal(own[key], value.half().float()) for key, value in finished.items())


@pytest.mark.slow
def test_snapshots_of_halves_are_whole_and_exported(sharded: Path) -> None:
    check_snapshots(sharded, SNAPSHOT_NAMES)


SHARES = """
import copy
import math
from torch.distributed.tensor import DTensor
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.training.processes import averaged, joined
from twostep.training.loop import Randomness, TrainingError
from twostep.training.shards import shard


def sizes(state):
    if isinstance(state, dict):
        return [sum(part) for part in zip((0, 0), *map(sizes, state.values()))]
    if isinstance(state, torch.Tensor):
        return state.numel(), (state.to_local() if isinstance(state, DTensor) else state).numel()
    return 0, 0


stage = Stage.model_validate({stage!r})
with joined(torch.device("cpu")):
    shard(pupil.denoiser.network)
    source = Source(2)
    trainer = StageTrainer(stage, source, teacher.denoiser, pupil.denoiser, sharded=True)
    trainer.iterate(0, Randomness.at(0, 0))
    for name, holder in trainer.state.items():
        print(name, *sizes(holder.state_dict()))
    kept = copy.deepcopy({name: holder.state_dict() for name, holder in trainer.state.items()})
    figures = trainer.iterate(1, Randomness.at(0, 1))
    try:
        trainer.check(1, *averaged([{name: float(value) for name, value in figures.items()}]))
    except TrainingError as error:
        print(error)
    for name, holder in trainer.state.items():
        holder.load_state_dict(kept[name])
    print("and on", math.isfinite(trainer.iterate(2, Randomness.at(0, 2))["student_grad_norm"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimiser", SHARDED_OPTIMISERS)
def test_each_holds_half_of_everything_and_stops_where_the_other_does(
    optimiser: str, tmp_path: Path
) -> None:
    shape = {"student_steps": 4, "teacher_steps": 8, "method": CONDITIONAL}
    stage = {**SHARED, **shape, "optimiser": optimiser}
    both = launch((MODELS + SHARES).replace("{stage!r}", repr(stage)), tmp_path)
    assert both.finish() == [0, 0], both.said()
    for said in both.said():
        *sizes, trouble, after = said.splitlines()
        assert trouble.startswith("The discriminator loss is nan at iteration 1"), (
            "of a share that only one has"
        )
        assert after == "and on True"
        held = {name: (int(whole), int(own)) for name, whole, own in map(str.split, sizes)}
        assert set(held) == {
            "student",
            "discriminator",
            "student_optimiser",
            "discriminator_optimiser",
            "average",
        }
        assert all(0.48 * whole < own < 0.52 * whole for whole, own in held.values()), held


KEPT = """
from pathlib import Path
import torch
from twostep.errors import TwostepError
from twostep.pretrain.model import random_bundle
from twostep.training.processes import joined, world
from twostep.training.run_folder import RunFolder
from twostep.training.recipe import Settings
from twostep.training.shards import gathered, shard

whole = random_bundle().denoiser.network
network = random_bundle().denoiser.network
with joined(torch.device("cpu")):
    folder = RunFolder(Path({out!r}), Settings())
    shard(network)
    if world().size == 2:
        folder.save("stage", {{"iteration": 1, "student": network.state_dict()}})
        try:
            folder.save("stage", {{"iteration": 2, "student": network.state_dict()}})
        except TwostepError as error:
            print(error)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    kept = folder.load("stage")
    network.load_state_dict(kept["student"])
    found, expected = gathered(network.state_dict()), whole.state_dict()
    same = all(torch.equal(value, expected[key]) for key, value in found.items())
    print(kept["iteration"], len(found), same)
"""


@pytest.mark.slow
def test_what_cannot_be_written_leaves_the_last_checkpoint_which_three_can_read(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "stage.2.shards").write_text("in the way")
    two = launch(KEPT.format(out=str(out)), tmp_path / "two")
    assert two.finish() == [0, 0], two.said()
    assert all("stage.2.shards cannot be written" in said for said in two.said())
    three = launch(KEPT.format(out=str(out)), tmp_path / "three", count=3)
    assert three.finish() == [0, 0, 0], three.said()
    num_weights = len(random_bundle().denoiser.network.state_dict())
    for first, *others in (two.said(), three.said()):
        assert first.endswith(f"1 {num_weights} True\n")
        assert all(said.endswith("1 0 True\n") for said in others)


@pytest.mark.slow
def test_one_process_has_nobody_to_share_with(model: Path, tmp_path: Path) -> None:
    alone = distill(write_recipe(tmp_path, model, CHAIN, shard=True), count=1)
    assert alone.finish() == [1]
    assert "this is one: start several" in alone.said()[0]
