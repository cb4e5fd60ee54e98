"""`benchmarks/mini_gpu.py`: what comes back of a machine, and mini from nothing at a hundredth."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from twostep.distill import DistillRecipe
from twostep.distill.plan import plan
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.saving import save_bundle
from twostep.networks.control import load_control
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle
from twostep.pretrain.sizes import MINI, SIZES
from twostep.training.recipe import load_recipe

from ..conftest import SAMPLE
from .test_mini import SMALL

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mini_gpu.py"


@pytest.fixture(scope="module")
def mini_gpu() -> Iterator[ModuleType]:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("mini_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mini_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mini_gpu"]


def test_the_teacher_takes_the_autoencoder_that_was_made_before(
    mini_gpu: ModuleType, tmp_path: Path
) -> None:
    teacher = mini_gpu.JOBS["teacher"]
    before = SCRIPT.parents[1] / "examples" / "mini"
    assert teacher.overrides(tmp_path) == [f'autoencoder="{before.as_posix()}"']
    own = tmp_path / "mini-vae" / "model"
    own.mkdir(parents=True)
    assert teacher.overrides(tmp_path) == [f'autoencoder="{own.as_posix()}"']


def test_what_was_packed_is_unpacked_as_it_was(
    mini_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini_gpu, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(mini_gpu, "MOST_BYTES", 400_000)
    files = {"model/a.bin": os.urandom(150_000), "model/b/c.bin": os.urandom(120_000)}
    for name, data in files.items():
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_bytes(data)
    too_much = tmp_path / "runs" / "model" / "d.bin"
    too_much.write_bytes(bytes(200_000))
    out = tmp_path / "out"
    wanted = [tmp_path / "runs" / name for name in files]
    digests = mini_gpu.pack([*wanted, too_much], tmp_path / "runs", out)
    assert len(list(out.iterdir())) == len(digests) == 3
    assert max(path.stat().st_size for path in out.iterdir()) == 100_000
    (out / "figures.json").write_text(json.dumps({"pieces": digests}))
    mini_gpu.unpack(out, tmp_path / "there")
    found = [path for path in (tmp_path / "there").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "there").as_posix() for path in found} == set(files)
    assert all((tmp_path / "there" / name).read_bytes() == data for name, data in files.items())
    (out / "weights-1.part").write_bytes(b"of another moment")
    with pytest.raises(ValueError, match=r"weights-1.part is not what figures.json says"):
        mini_gpu.unpack(out, tmp_path / "there")


def test_a_hundredth_has_a_hundredth_of_the_iterations(mini_gpu: ModuleType) -> None:
    job = mini_gpu.JOBS["teacher"]
    assert mini_gpu.scaled(job, 1) == []
    assert mini_gpu.scaled(job, 100) == [
        "scenes=2000",
        "loop.iterations=90",
        "loop.batch_size=32",
        "loop.warmup_iterations=2",
        "loop.log_every=1",
    ]
    assert "stages.0.iterations=9" in mini_gpu.scaled(mini_gpu.JOBS["full"], 100)


@pytest.mark.slow
def test_mini_is_made_from_nothing(
    mini_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part by its own recipe, a hundredth of it at a small size, each on a bare machine."""
    monkeypatch.setitem(SIZES, "mini", SMALL)

    def run(part: str, taken: list[str], *overrides: str) -> Path:
        out = tmp_path / "out" / part
        runs = tmp_path / f"machine-{part}"
        arguments = [part, "--out", str(out), "--runs", str(runs), "--device", "cpu"]
        arguments += ["--scale", "100", "--drawings", str(SAMPLE)]
        for each in taken:
            arguments += ["--take", str(tmp_path / "out" / each)]
        for override in overrides:
            arguments += ["-o", override]
        monkeypatch.setattr(sys, "argv", ["mini_gpu.py", *arguments])
        mini_gpu.main()
        files = [path.name for path in out.iterdir()]
        assert {"figures.json", "log.jsonl", "weights-0.part"} <= set(files)
        assert len(files) <= 8
        return runs

    prompts = 'sample_prompts=["a fox", "a flat apple above a fox"]'
    small = ("compile=false",)
    run("vae", [], *small, "crop_pixels=16", "loop.iterations=10", "num_pictures=40")
    run("teacher", ["vae"], *small, prompts, "loop.iterations=10", "scenes=40", "sample_seeds=[0]")
    run("silhouette", ["teacher"], *small, "scenes=40")
    data = ("data_options.count=40", prompts)
    run("lora", ["teacher"], *data)
    run("full", ["teacher"], *data)

    for part in ("teacher", "lora", "full", "silhouette"):
        mini_gpu.unpack(tmp_path / "out" / part, tmp_path / "home")
    home = tmp_path / "home"
    teacher = load_bundle(str(home / "mini-teacher" / "model"))
    assert teacher.contract.name == "mini"
    assert generate(teacher, Request("a fox", steps=3)).images[0].size == (32, 32)
    students = home / "mini" / "model" / "students"
    assert {path.name for path in students.iterdir()} == {
        f"mini_{steps}step_unet.safetensors" for steps in (8, 4, 2, 1)
    }
    whole = home / "mini-teacher" / "model" / "students"
    whole.mkdir()
    for path in students.iterdir():
        path.replace(whole / path.name)
    for steps in (1, 2, 4, 8):
        student = load_bundle(str(home / "mini-teacher" / "model"), steps=steps)
        assert student.contract.steps == steps
        assert student.denoiser.prediction_type == ("x0" if steps == 1 else "eps")
        assert generate(student, Request("a fox", steps=steps)).images[0].size == (32, 32)
    for steps in (2, 4, 8):
        lora = home / "mini-lora" / "model" / "students" / f"mini_{steps}step_lora.safetensors"
        student = load_with_loras(str(home / "mini-teacher" / "model"), [str(lora)])
        assert student.contract.steps == steps
    control = load_control(
        str(home / "mini-silhouette" / "model"),
        teacher.denoiser.network,
        teacher.codec.pixels_per_latent,
    )
    assert control.config.conditioning_embedding_out_channels == [16, 32, 64, 128]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "largest_gib"), [("mini", 40.0), ("mini-lora", 40.0)], ids=["full", "lora"]
)
def test_its_chains_are_planned_before_there_are_weights(
    recipe: str, largest_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model folder of the size's configs is all that a plan reads."""
    save_bundle(random_bundle(size=MINI), tmp_path / "runs" / "mini-teacher" / "model")
    monkeypatch.chdir(tmp_path)
    settings = load_recipe(recipe, DistillRecipe).model_copy(update={"device": "cuda"})
    planned = plan(settings)
    assert [stage.stage.name for stage in planned.stages] == [
        stage.name for stage in settings.stages
    ]
    # One UNet has 19.2 million parameters, and 128 steps to 32 with guidance are 8 calls of it.
    trained = planned.stages[0].trained["student"]
    assert trained == 19_232_756 if recipe == "mini" else trained < 2_500_000
    assert planned.stages[0].evaluations == pytest.approx(8 / 3)
    assert max(stage.highest for stage in planned.stages) / 2**30 < largest_gib
