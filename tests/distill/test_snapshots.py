"""Snapshots: the student of one moment in a file, which other programs' forms are made of."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill import DistillRecipe, distil
from twostep.distill.plan import plan
from twostep.distill.snapshots import find_snapshot, snapshots_of, usual_targets
from twostep.formats import ModelError, resolve
from twostep.formats.lora_files import read_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.training.checkpoints import read_checkpoint
from twostep.training.run_folder import RunFolder

from .test_trainer import REGRESSION

NAME = "4-regression-lora"


def recipe(**changes: object) -> DistillRecipe:
    values = {
        "student_steps": 4,
        "teacher_steps": 8,
        "method": REGRESSION,
        "iterations": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_iterations": 1,
        "checkpoint_every": 4,
        "log_every": 4,
        "precision": "fp32",
        "lora_rank": 2,
        "snapshot_every": 2,
    }
    return DistillRecipe.model_validate(
        {"sample_prompts": ["a red fox"], "release": [], "stages": [values | changes]}
    )


def run(settings: DistillRecipe, teacher: Bundle, source: object, path: Path) -> Path:
    distil(settings, teacher, source, RunFolder(path, settings), version="0", recipe_name="test")
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with snapshots at 2 and 4 of 4 iterations."""
    from twostep.pretrain.model import random_bundle

    from .conftest import Handful

    teacher = random_bundle()
    return run(recipe(), teacher, Handful(teacher.text), tmp_path_factory.mktemp("runs") / "a")


@pytest.mark.slow
def test_a_snapshot_is_the_student_of_that_moment(
    chain: Path, teacher: Bundle, source: object, tmp_path: Path
) -> None:
    """A run of two iterations ends with the student that one of four has in its middle."""
    assert [(each.stage, each.iteration) for each in snapshots_of(chain)] == [(NAME, 2), (NAME, 4)]
    short = run(recipe(iterations=2, snapshot_every=None), teacher, source, tmp_path / "b")
    finished = read_checkpoint(short / "checkpoints" / f"{NAME}-finished.pt")["weights"]
    found = load_file(find_snapshot(chain, "2").path)
    assert found.keys() == {f"unet.{key}" for key in finished}
    last = load_file(find_snapshot(chain, "4").path)
    assert all(not torch.equal(found[key], last[key]) for key in found if "lora_B" in key)
    for key, value in finished.items():
        assert found[f"unet.{key}"].dtype == torch.float16
        assert torch.equal(found[f"unet.{key}"], value.half())
    contract = resolve(find_snapshot(chain, "2").path).contract
    assert (contract.role, contract.steps, contract.lora_rank) == ("student", 4, 2)


@pytest.mark.slow
def test_the_usual_forms_of_a_snapshot_are_written(chain: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(chain), "--at", "2"])
    assert result.exit_code == 0, result.output
    folder = chain / "exports" / f"{NAME}-000002"
    assert result.stdout.split() == [
        str(folder / f"random-4step_{form}.safetensors") for form in ("lora-kohya", "lora-peft")
    ]
    snapshot = find_snapshot(chain, f"{NAME}:2").path
    network = load_bundle(chain / "model").denoiser.network
    changes = read_lora(snapshot, {"unet": network})
    for path in result.stdout.split():
        for layer, change in read_lora(Path(path), {"unet": network}).items():
            assert change.alpha == changes[layer].alpha == 2
            assert torch.equal(change.up, changes[layer].up)
            assert torch.equal(change.down, changes[layer].down)


@pytest.mark.slow
def test_one_form_of_a_snapshot_goes_where_it_is_told(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "unet.safetensors"
    arguments = ["export", str(chain), "--at", "4", "--to", "unet", "-o", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert resolve(out).contract.lora_rank is None
    layer = "mid_block.resnets.0.conv1"
    network = load_bundle(chain / "model").denoiser.network
    change = read_lora(find_snapshot(chain, "4").path, {"unet": network})[f"unet.{layer}"]
    product = torch.einsum("or,rikl->oikl", change.up.float()[:, :, 0, 0], change.down.float())
    merged = network.get_submodule(layer).weight + product
    assert product.abs().max() > 1e-3
    assert torch.allclose(load_file(out)[f"{layer}.weight"].float(), merged, atol=1e-3)


def snapshot_files(folder: Path, *names: str) -> Path:
    (folder / "snapshots").mkdir()
    (folder / "run.toml").touch()
    for name in names:
        (folder / "snapshots" / f"{name}.safetensors").touch()
    return folder


def test_what_snapshots_there_are_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder of `twostep distill`"):
        find_snapshot(tmp_path, "1000")
    run = snapshot_files(tmp_path)
    with pytest.raises(ModelError, match="Set snapshot_every in the recipe"):
        find_snapshot(run, "1000")
    names = ("8-regression-000500", "8-regression-001000", "4-lightning-conditional-001000")
    for name in (*names, "8-regression.1f.partial", "notes"):
        (run / "snapshots" / f"{name}.safetensors").touch()
    listed = "1000 of 4-lightning-conditional; 500, 1000 of 8-regression"
    with pytest.raises(ModelError, match=f"no snapshot at 700; there are {listed}"):
        find_snapshot(run, "700")
    with pytest.raises(ModelError, match=f"no snapshot at 4-regression:500; there are {listed}"):
        find_snapshot(run, "4-regression:500")
    with pytest.raises(ModelError, match="one of 4-lightning-conditional:1000, 8-regression:1000"):
        find_snapshot(run, "1000")
    with pytest.raises(ModelError, match="expected a number of iterations, as 1000, or a stage"):
        find_snapshot(run, "last")
    assert find_snapshot(run, "500").path.name == "8-regression-000500.safetensors"
    assert find_snapshot(run, "8-regression:1000").iteration == 1000


def test_the_command_says_what_it_needs() -> None:
    result = CliRunner().invoke(app, ["export", "nano", "--to", "unet"])
    assert result.exit_code == 2
    assert "give --to and --out" in result.output
    result = CliRunner().invoke(app, ["export", "nano", "--at", "100"])
    assert result.exit_code == 1
    assert "nano is no folder of `twostep distill`" in result.output


def test_the_usual_forms_are_those_that_can_say_how_to_sample() -> None:
    nano = resolve("nano").contract_for(4)
    assert usual_targets(nano) == ("comfyui", "unet")


@pytest.mark.slow
def test_the_disk_of_snapshots_is_planned() -> None:
    """Two bytes of a weight, as often as they are written."""
    (stage,) = plan(recipe(iterations=9, snapshot_every=2)).stages
    assert stage.snapshots == 4 * 2 * stage.trained["student"]
    (without,) = plan(recipe(snapshot_every=None)).stages
    assert without.snapshots == 0
