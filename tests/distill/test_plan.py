"""Plans against what happens: nano stages against torch's own allocator, SDXL's size against a
recorded run.
"""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill import DistillRecipe
from twostep.distill.chain import prepared_stages
from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.plan import advise, plan, try_changes
from twostep.distill.trainer import StageTrainer
from twostep.formats.locate import WEIGHTS
from twostep.models.loading import load_bundle
from twostep.pretrain.model import random_bundle
from twostep.training import device as devices
from twostep.training.loop import Randomness
from twostep.training.run_folder import RunFolder

from .conftest import Handful
from .launching import launch
from .test_trainer import CONDITIONAL, CONVERSION, REGRESSION, UNCONDITIONAL

GIB = 2**30
SDXL = Path(__file__).parents[2] / "benchmarks" / "sdxl_unet.json"
SHARED = {"iterations": 1, "batch_size": 16, "learning_rate": 1e-4, "precision": "fp32"}
ON_SHARED_BASE = {"discriminator_lora": True}


def recipe(*stages: dict, **settings: object) -> DistillRecipe:
    defaults = {**SHARED, "student_steps": 8}
    values = [
        {"teacher_steps": 32, **stage} if stage["method"] is not CONVERSION else stage
        for stage in stages
    ]
    return DistillRecipe.model_validate(
        {"sample_prompts": ["a red fox"], "defaults": defaults, "stages": values, **settings}
    )


def allocated(settings: DistillRecipe) -> int:
    """The most bytes of torch's CPU allocator while the last stage is prepared and trained for two
    iterations.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        teacher = random_bundle()
        source = Handful(teacher.text)
        for prepared in prepared_stages(settings, teacher):
            stage = prepared.stage
            if stage is settings.stages[-1]:
                trainer = StageTrainer(stage, source, prepared.teacher, prepared.student)
                for iteration in range(2):
                    trainer.iterate(iteration, Randomness.at(0, iteration))
    living = highest = 0
    for event in profiler.profiler.kineto_results.events():
        living += event.nbytes() if event.name() == "[memory]" else 0
        highest = max(highest, living)
    return highest


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([{"method": REGRESSION, "guidance": 3.0}], marks=pytest.mark.slow),
        pytest.param(
            [{"method": REGRESSION, "lora_rank": 12, "precision": "bf16"}], marks=pytest.mark.slow
        ),
        pytest.param([{"method": CONDITIONAL, "precision": "bf16"}], marks=pytest.mark.slow),
        pytest.param(
            [
                {"method": REGRESSION, "lora_rank": 12},
                {
                    "method": {**UNCONDITIONAL, **ON_SHARED_BASE},
                    "gradient_checkpointing": True,
                    "lora_rank": 12,
                },
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [{"method": REGRESSION}, {"method": CONVERSION, "student_steps": 1}],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [{"method": CONDITIONAL, "optimiser": "prodigy", "learning_rate": 1.0}],
            marks=pytest.mark.slow,
        ),
        pytest.param([{"method": REGRESSION, "optimiser": "adafactor"}], marks=pytest.mark.slow),
        pytest.param([{"method": REGRESSION, "optimiser": "lion"}], marks=pytest.mark.slow),
    ],
    ids=[
        *("guided", "lora", "conditional", "shared-base", "conversion"),
        *("prodigy", "adafactor", "lion"),
    ],
)
def test_a_nano_stage_takes_what_was_planned(stages: list[dict]) -> None:
    settings = recipe(*stages)
    planned = plan(settings).stages[-1]
    assert planned.peak == pytest.approx(allocated(settings), rel=0.2)
    assert sum(planned.memory.values()) == planned.peak


ALLOCATED = """
from pathlib import Path
import torch
from tests.distill.test_plan import CONDITIONAL, allocated, recipe
from twostep.training.processes import joined, world

with joined(torch.device("cpu")):
    peak = allocated(recipe({{"method": CONDITIONAL}}))
    if world().is_first:
        Path({out!r}).write_text(str(peak))
"""


@pytest.mark.slow
def test_one_of_two_processes_takes_what_was_planned(tmp_path: Path) -> None:
    out = tmp_path / "peak"
    both = launch(ALLOCATED.format(out=str(out)), tmp_path / "said", count=2)
    assert both.finish() == [0, 0], both.said()
    settings = recipe({"method": CONDITIONAL})
    (alone,) = plan(settings).stages
    (planned,) = plan(settings, processes=2).stages
    assert planned.peak == pytest.approx(int(out.read_text()), rel=0.1)
    assert sum(planned.memory.values()) == planned.peak
    # Gradients of both networks stay, where one process has those of one; half a batch is computed.
    weights = {role: 4 * count for role, count in planned.trained.items()}
    assert planned.memory["gradients"] == sum(weights.values())
    assert alone.memory["gradients, of one at a time"] == max(weights.values())
    assert planned.memory["activations"] < 0.7 * alone.memory["activations"]
    assert planned.pictures == alone.pictures + sum(weights.values())


@pytest.mark.slow
def test_a_student_that_stays_as_a_teacher_keeps_no_gradients() -> None:
    stages = [
        {"method": REGRESSION},
        {"method": REGRESSION, "student_steps": 4, "teacher_steps": 8},
        {"method": REGRESSION, "student_steps": 2, "teacher_steps": 4},
    ]
    settings = recipe(*stages)
    said: list[tuple[int, int, str]] = []
    planned = plan(settings, advance=lambda *step: said.append(step))
    assert said == [(i, 3, stage.name) for i, stage in enumerate(settings.stages)]
    alone = [stage.memory["frozen weights"] for stage in planned.stages]
    shared = [stage.memory["frozen weights"] for stage in plan(settings, processes=2).stages]
    assert shared == alone
    assert alone[2] > alone[1]


@pytest.mark.slow
def test_evaluations_parameters_and_bytes_are_counted() -> None:
    guided = {"method": {**REGRESSION, "reuse": 2}, "guidance": 3.0, "iterations": 10}
    planned = plan(recipe(guided, {"method": CONDITIONAL}))
    first, second = planned.stages
    assert (first.evaluations, second.evaluations) == (4 * 2 / 2, 4)
    teacher = load_bundle("nano")
    whole = sum(parameter.numel() for parameter in teacher.denoiser.network.parameters())
    assert first.trained == {"student": whole}
    assert second.memory["student moments"] == 2 * second.memory["student weights"] == 2 * 4 * whole
    # four more batches of text alone, in float32
    assert first.memory["kept batches"] > 4 * 16 * 20 * 160 * 4
    assert (planned.item_bytes, planned.num_items) == (2 * 4 * 16 * 16 + 3, 0)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configs of SDXL's UNet for 256 px, an autoencoder and encoders of little
    weight; no weights.
    """
    folder = tmp_path_factory.mktemp("models") / "sdxl"
    shutil.copytree(
        WEIGHTS / "nano", folder, ignore=shutil.ignore_patterns("*.safetensors", "students")
    )
    (folder / "unet" / "config.json").write_text(SDXL.read_text())
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
        )
    vae.save_config(folder / "vae")
    for name, width in (("text_encoder", 768), ("text_encoder_2", 1280)):
        sizes = {
            "hidden_size": width,
            "projection_dim": width,
            "num_hidden_layers": 1,
            "vocab_size": 1070,
        }
        config = CLIPTextConfig(**sizes, intermediate_size=64, num_attention_heads=4)
        config.save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    contract = replace(random_bundle().contract, sizes=((256, 256),))
    (folder / "twostep.json").write_text(contract.to_json())
    return folder


@pytest.mark.slow
def test_sdxl_takes_what_was_planned(sdxl: Path) -> None:
    shared = {"lora_rank": 64, "batch_size": 1, "gradient_checkpointing": True}
    first = {"student_steps": 32, "teacher_steps": 128, "method": REGRESSION, **shared}
    second = {"method": {**CONDITIONAL, **ON_SHARED_BASE}, **shared}
    (planned,) = plan(recipe(first, second, model=str(sdxl)), only=1).stages
    assert planned.trained["student"] == 196_751_360
    # benchmarks/full_size_distill.py, base, finished student, student, discriminator
    measured = 17.4 * GIB
    assert planned.peak == pytest.approx(measured, rel=0.2)
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(json.loads(SDXL.read_text()))
    base = sum(parameter.numel() for parameter in network.parameters())
    assert planned.memory["frozen weights"] > 4 * (base + 196_751_360)


@pytest.mark.slow
def test_a_folder_without_weights_is_enough(tmp_path: Path) -> None:
    folder = shutil.copytree(
        WEIGHTS / "nano", tmp_path / "mine", ignore=shutil.ignore_patterns("*.safetensors")
    )
    stage = {"method": REGRESSION, "batch_size": 2}
    mine = plan(recipe(stage, model=str(folder)))
    assert mine.stages[0].peak == plan(recipe(stage)).stages[0].peak


@pytest.mark.slow
def test_off_the_cpu_attention_takes_less() -> None:
    stage = {"method": CONDITIONAL, "gradient_checkpointing": True}
    here, there = (plan(recipe(stage, device=device)).stages[0].peak for device in ("cpu", "cuda"))
    assert there < here


@pytest.mark.slow
def test_off_the_cpu_bfloat16_is_computed_whatever_this_cpu_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "computes_bfloat16", lambda device_type: device_type != "cpu")
    there = [
        plan(recipe({"method": REGRESSION, "precision": precision}, device="cuda")).stages[0].memory
        for precision in ("bf16", "fp32")
    ]
    assert there[0]["activations"] < there[1]["activations"]
    here = [
        plan(recipe({"method": REGRESSION, "precision": precision}, device="cpu")).stages[0].memory
        for precision in ("bf16", "fp32")
    ]
    assert here[0] == here[1]


@pytest.mark.slow
def test_offloaded_moments_are_on_disk_and_not_on_the_accelerator() -> None:
    stage = {"method": CONDITIONAL, "optimiser": "prodigy", "learning_rate": 1.0}
    here, there = (
        plan(recipe({**stage, "offload": offload}, device="cuda")).stages[0]
        for offload in (False, True)
    )
    most = max(here.moments.values())
    assert there.moments == here.moments and there.checkpoint == here.checkpoint
    # Prodigy brings all of a network's at once, and AdamW a portion, which is all of nano's.
    assert here.peak - there.peak == sum(here.moments.values()) - most
    assert there.memory["moments, of one portion"] == most
    assert here.pictures - there.pictures == sum(here.moments.values())
    assert sum(there.memory.values()) == there.peak
    on_cpu = plan(recipe({**stage, "offload": True}, device="cpu")).stages[0]
    assert "moments, of one portion" not in on_cpu.memory


def test_changes_are_tried_one_by_one_and_then_all_together() -> None:
    peaks = {"batch_size": 7, "precision": 3}
    said: list[tuple[int, int, str]] = []
    tried = try_changes(
        [{"batch_size": 1}, {"precision": "bf16"}],
        lambda change: sum(peaks[key] for key in change),
        lambda *step: said.append(step),
    )
    both = {"batch_size": 1, "precision": "bf16"}
    assert tried == [({"precision": "bf16"}, 3), ({"batch_size": 1}, 7), (both, 10)]
    names = ("batch_size", "precision", "batch_size, precision")
    assert said == [(i, 3, name) for i, name in enumerate(names)]


@pytest.mark.slow
def test_advice_puts_the_best_first_and_all_together_last() -> None:
    settings = recipe({"method": CONDITIONAL, "lora_rank": 12})
    *entries, (together, least) = advise(settings, 0)
    peaks = [peak for _, peak in entries]
    assert peaks == sorted(peaks) and least < peaks[0] < plan(settings).stages[0].highest
    assert together == {key: value for change, _ in entries for key, value in change.items()}
    assert together["method.discriminator_lora"] is True
    change, peak = next(entry for entry in entries if "batch_size" in entry[0])
    halved = recipe({"method": CONDITIONAL, "lora_rank": 12, **change})
    assert peak == plan(halved).stages[0].highest


@pytest.mark.slow
def test_too_little_memory_fails_with_advice(tmp_path: Path) -> None:
    # so that little is left to advise
    spared = {"batch_size": 1, "precision": "bf16", "optimiser": "adamw8bit"}
    stage = {**SHARED, **spared, "student_steps": 4, "teacher_steps": 8, "method": CONDITIONAL}
    mine = tmp_path / "mine.toml"
    mine.write_text(tomli_w.dumps({"sample_prompts": ["a red fox"], "stages": [stage]}))
    answer = CliRunner().invoke(app, ["plan", str(mine), "--memory", "0.1GB"])
    assert answer.exit_code == 1
    assert (
        "conditional would take" in answer.output
        and "gradient_checkpointing = True" in answer.output
    )
    enough = CliRunner().invoke(app, ["plan", str(mine), "--memory", "1GiB"])
    assert enough.exit_code == 0, enough.output
    judge = Discriminator(random_bundle().denoiser, conditional=True, levels="all")
    trained = sum(parameter.numel() for parameter in judge.parameters())
    assert f"discriminator {trained:,}" in enough.output and "would take" not in enough.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["no-such-recipe"], "There is no recipe 'no-such-recipe'"),
        (["nano-quick", "-o", "stages.0.teacher_steps=7"], "no multiple of student_steps"),
        (["nano-quick", "-o", "model=nowhere"], "nowhere does not exist"),
        (["nano-quick", "--memory", "much"], "much is no size"),
        (["nano-quick", "--device", "gpu"], "gpu is no device; write cuda"),
        (["nano-quick", "--processes", "3"], "batch_size 16, which 3 processes cannot share"),
        (["nano-decoder", "--processes", "7"], "which 7 processes cannot share"),
        (["sdxl-full-8x80gb", "--processes", "8"], "is not planned: give -o shard=false"),
    ],
)
def test_what_cannot_be_planned_says_why(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    answer = CliRunner().invoke(app, ["plan", *words])
    assert answer.exit_code != 0 and told in answer.output


@pytest.mark.slow
def test_a_method_in_this_folder_can_be_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_method.py").write_text(
        "from twostep.distill.methods.regression import Regression\n\n"
        "class Mine(Regression):\n    name = 'mine'\n"
    )
    stage = {**SHARED, "student_steps": 8, "teacher_steps": 32, "batch_size": 1}
    values = {"sample_prompts": ["x"], "stages": [{**stage, "method": {"name": "my_method:Mine"}}]}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(values))
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["plan", "mine.toml"])
    assert answer.exit_code == 0, answer.output
    assert "\n8-mine: 1 iterations of 1" in answer.output


@pytest.mark.slow
def test_the_disk_that_is_planned_is_what_checkpoints_take(tmp_path: Path) -> None:
    stages = [
        {"method": REGRESSION, "lora_rank": 64, "batch_size": 2, "keep_checkpoints": 1},
        {"method": CONDITIONAL, "lora_rank": 64, "batch_size": 2, "keep_checkpoints": 3},
        {"method": CONDITIONAL, "student_steps": 4, "optimiser": "adafactor", "batch_size": 2},
    ]
    settings = recipe(*stages)
    planned = plan(settings)
    teacher = random_bundle()
    sizes = []
    for prepared in prepared_stages(settings, teacher):
        source = Handful(teacher.text)
        trainer = StageTrainer(prepared.stage, source, prepared.teacher, prepared.student)
        trainer.iterate(0, Randomness.at(0, 0))
        folder = RunFolder(tmp_path / prepared.stage.name, prepared.stage)
        state = {name: holder.state_dict() for name, holder in trainer.state.items()}
        folder.save("x", {"iteration": 1, **state})
        sizes.append(folder.checkpoint("x").stat().st_size)
        trainer.remove_roles()
    first, second, third = planned.stages
    # Names and headers weigh as much as small matrices do.
    assert [first.checkpoint, second.checkpoint, third.checkpoint] == [
        pytest.approx(size, rel=0.05) for size in sizes
    ]
    assert first.finished == 4 * first.trained["student"]
    standing = first.finished + second.finished
    assert planned.disk == max(
        first.finished + 4 * second.checkpoint, standing + 3 * third.checkpoint
    )
