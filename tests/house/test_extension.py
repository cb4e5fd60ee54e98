"""The price of a new thing: all that is below is written in this file alone.

A medium with its codec, a model family with its own backbone and prompts, a distillation method and
an engine are registered, trained, exported, found again, drawn and saved. No file of the package
knows any of them, and none of them derives from a class of the package but `nn.Module`'s own.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn

from twostep import Studio
from twostep.contract import Contract, VariancePreservingSpec
from twostep.diffusion import VariancePreserving, trained_times
from twostep.distill import DistillRecipe, distil
from twostep.distill.method import ContractChanges, Cost, MethodSettings
from twostep.distill.methods import registry
from twostep.distill.methods.registry import register_method
from twostep.distill.pairs import Batches, Pair, draw_teacher_step, student_landing
from twostep.distill.plan import plan
from twostep.distill.recipe import Stage
from twostep.distill.roles import OptimiserSettings, Role, learner
from twostep.engines import engine, register_engine
from twostep.files import write_atomically
from twostep.formats import resolve
from twostep.formats.checkpoint import Checkpoint, student_path
from twostep.media.codec import Encoded
from twostep.models import families
from twostep.models.bundle import Bundle
from twostep.models.families import register_family
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import Request
from twostep.training.loop import Randomness
from twostep.training.recipe import RecipeError, load_recipe
from twostep.training.run_folder import RunFolder

CHANNELS = 4
LENGTH = 8
WORDS = 6


# A medium: curves of 32 values, whose latents are [4, 8]. Two dimensions; pictures have three.
class CurveCodec:
    """Curves [batch, values] in -1..1 <-> latents [batch, 4, values / 4]; nothing is lost."""

    media = "curve"

    def latent_shape(self, width: int, height: int) -> Sequence[int]:
        return (CHANNELS, width // CHANNELS)

    def encode(self, media: Tensor) -> Tensor:
        return media.unflatten(1, (-1, CHANNELS)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).flatten(1)

    def preview(self, latents: Tensor) -> Tensor:
        return latents[:, None].expand(-1, 3, -1, -1).clamp(-1, 1)

    def items(self, media: Tensor) -> list[Any]:
        return media.tolist()

    def file(self, item: Any, metadata: Mapping[str, str]) -> Encoded:
        text = json.dumps({"values": item, "metadata": dict(metadata)})
        return Encoded(text.encode(), ".json", "application/json")


# Prompts: a hash of the words instead of a text encoder.
@dataclass(frozen=True)
class HashedPrompts:
    """Every prompt becomes six numbers."""

    networks: dict[str, nn.Module] = field(default_factory=dict)

    def with_networks(self, networks: Mapping[str, Any]) -> "HashedPrompts":
        return self

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        rows = [torch.randn(WORDS, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.zeros(len(rows), 1, 0), torch.stack(rows)

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        text, pooled = self.encode(prompts)
        return Conditioning(text, pooled, torch.zeros(len(pooled), 6))

    def unknown_words(self, prompt: str) -> list[str]:
        return []


# A backbone: a perceptron, which takes no LoRA and has no features.
class CurveNetwork(nn.Module):
    """Maps noisy curves, a time and the hashed prompt to eps."""

    spec = BackboneSpec("curves", in_channels=CHANNELS, out_channels=CHANNELS, latent_ndim=2)

    def __init__(self) -> None:
        super().__init__()
        size = CHANNELS * LENGTH
        self.layers = nn.Sequential(nn.Linear(size + 1 + WORDS, 64), nn.SiLU(), nn.Linear(64, size))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        inputs = torch.cat([x.flatten(1), time[:, None] / 1000, conditioning.pooled], dim=1)
        return self.layers(inputs).view(x.shape)


# A family: how such models lie on disk.
class CurveFamily:
    """A folder with the contract and `network.safetensors`."""

    name = "curves"

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        contract = checkpoint.contract_for(steps)
        network = CurveNetwork()
        file = checkpoint.path / "network.safetensors"
        if contract.role == "student":
            file = checkpoint.students[contract.steps].path
        if not outline:
            network.load_state_dict({key: v.float() for key, v in load_file(file).items()})
        network.eval().requires_grad_(False)
        return Bundle(
            denoiser=Denoiser(network, VariancePreserving.linear(), contract.prediction_type),
            codec=CurveCodec(),
            text=HashedPrompts(),
            contract=contract,
            students=tuple(checkpoint.students),
            origin=(checkpoint.name,),
        )

    def save(self, bundle: Bundle, folder: Path) -> None:
        with write_atomically(folder / "network.safetensors") as file:
            file.write(save(bundle.denoiser.network.state_dict()))
        with write_atomically(folder / "twostep.json") as file:
            file.write(bundle.contract.to_json().encode())

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        path = student_path(contract, folder)
        with write_atomically(path) as file:
            file.write(save(dict(weights), contract.to_metadata()))
        return path


# A method: the absolute error instead of the squared one, to a power of its own.
class AbsoluteSettings(MethodSettings):
    """The table [stages.method] of this method."""

    name: str = "absolute"
    power: float = Field(1.0, gt=0, description="of the absolute error")


class Absolute:
    """The student's landing is pulled to the teacher's by the absolute error."""

    name = "absolute"
    Settings = AbsoluteSettings
    learns_from_itself = False

    def __init__(self, stage: Stage) -> None:
        stage.check_teacher_steps()
        self.stage = stage

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        return {"student": learner(student, OptimiserSettings.of(self.stage))}

    def draw(
        self, iteration: int, batches: Batches, models: Mapping[str, Any], random: Randomness
    ) -> Pair:
        taken = draw_teacher_step(
            batches,
            models["teacher"],
            random,
            drawn_steps=self.stage.student_steps,
            student_steps=self.stage.student_steps,
            teacher_steps=self.stage.teacher_steps,
            guidance=self.stage.guidance,
        )
        return Pair(taken, student_landing(models["student"], taken))

    def turns(self, iteration: int) -> Sequence[str]:
        return ("student",)

    def loss(self, role: str, pair: Pair, models: Mapping[str, Any]) -> Mapping[str, Tensor]:
        error = (pair.student - pair.teacher.x_s).abs().mean()
        return {"total": error**self.stage.method.power, "error": error}

    def describe(self, last_student: Denoiser) -> ContractChanges:
        times = trained_times(self.stage.student_steps, last_student.schedule)
        return ContractChanges(last_student.prediction_type, times)

    def limits(self) -> Mapping[str, Any]:
        return {}

    def cost(self) -> Cost:
        return Cost(teacher_evaluations=self.stage.teacher_steps / self.stage.student_steps)


# An engine: runs the network as it is, and counts its calls.
class CountingEngine:
    """Counts the calls of the network, and remembers the sizes that it prepared for."""

    name = "counting"

    def __init__(self) -> None:
        self.num_calls = 0
        self.sizes: list[tuple[int, int]] = []

    def prepare(self, bundle: Bundle, sizes: Sequence[tuple[int, int]]) -> Bundle:
        self.sizes.extend(sizes)
        backbone = _Counted(bundle.denoiser.network, self)
        return replace(bundle, denoiser=replace(bundle.denoiser, backbone=backbone))


@dataclass(frozen=True)
class _Counted:
    network: nn.Module
    engine: CountingEngine
    spec: BackboneSpec = CurveNetwork.spec

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.engine.num_calls += 1
        return self.network(x, time, conditioning)


ENGINE = CountingEngine()


class Waves:
    """Sines of random phase, which the prompts do not name."""

    def __init__(self, prompts: HashedPrompts) -> None:
        self.prompts = prompts

    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        phases = 6.28 * torch.rand(count, 1, generator=tensors)
        curves = torch.sin(torch.linspace(0, 6.28, CHANNELS * LENGTH) + phases)
        prompts = [words.choice(("a wave", "a curve")) for _ in range(count)]
        return CurveCodec().encode(curves), self.prompts.conditioning(prompts, 32, 1)

    def empty(self, like: Conditioning) -> Conditioning:
        return self.prompts.conditioning([""], 32, 1).expand(len(like))


RECIPE = """
model = "{model}"
device = "cpu"
release = [4, 2]
sample_prompts = ["a wave"]

[defaults]
batch_size = 16
iterations = 40
learning_rate = 3e-3
warmup_iterations = 1
precision = "fp32"
checkpoint_every = 20
log_every = 1
ema_decay = 0.5

[defaults.methods.absolute]
power = 1.5

[[stages]]
student_steps = 4
teacher_steps = 8
[stages.method]
name = "absolute"

[[stages]]
student_steps = 2
teacher_steps = 4
[stages.method]
name = "absolute"
"""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register what is above, and leave the registries as they were."""
    with (
        patch.dict(families._FAMILIES),
        patch.dict(registry._REGISTERED),
        patch.dict(engine._ENGINES),
    ):
        register_family(CurveFamily())
        register_method(Absolute)
        register_engine(ENGINE)
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a teacher of eight steps with random weights."""
    folder = tmp_path_factory.mktemp("curves") / "teacher"
    contract = Contract(
        name="curves",
        role="teacher",
        steps=8,
        trained_times=(),
        prediction_type="eps",
        spacing="trailing",
        guidance=1.0,
        sizes=((CHANNELS * LENGTH, 1),),
        base="curves",
        lora_rank=None,
        lora_alpha=None,
        recipe="none",
        version="0",
        family="curves",
        media="curve",
        schedule=VariancePreservingSpec(betas="linear", beta_start=0.0001, beta_end=0.02),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CurveNetwork().eval()
    denoiser = Denoiser(network, VariancePreserving.linear())
    save_bundle(Bundle(denoiser, CurveCodec(), HashedPrompts(), contract), folder)
    return folder


@pytest.fixture(scope="module")
def recipe(teacher: Path) -> DistillRecipe:
    path = teacher.with_name("curves.toml")
    path.write_text(RECIPE.format(model=teacher))
    return load_recipe(path, DistillRecipe)


@pytest.fixture(scope="module")
def run(teacher: Path, recipe: DistillRecipe) -> Iterator[RunFolder]:
    """The folder of the finished run."""
    bundle = load_bundle(teacher)
    folder = RunFolder(teacher.with_name("run"), recipe)
    written = distil(
        recipe, bundle, Waves(HashedPrompts()), folder, version="0", recipe_name="curves"
    )
    assert sorted(written) == [2, 4]
    yield folder


def test_the_students_learn_by_the_method(run: RunFolder) -> None:
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    for stage in ("4-absolute", "2-absolute"):
        errors = [line["error"] for line in lines if line["part"] == stage and "error" in line]
        assert len(errors) == 40
        assert sum(errors[-5:]) < 0.7 * sum(errors[:5]), stage
    assert len(list((run.path / "samples").glob("*.png"))) == 4


def test_they_are_exported_with_their_contract_and_load_again(run: RunFolder) -> None:
    model = run.path / "model"
    checkpoint = resolve(str(model))
    assert [contract.steps for contract in checkpoint.contracts] == [8, 4, 2]
    assert {contract.family for contract in checkpoint.contracts} == {"curves"}
    assert {contract.media for contract in checkpoint.contracts} == {"curve"}
    student = load_bundle(model, steps=4)
    finished = run.load("4-absolute-finished")
    assert finished is not None
    for key, value in student.denoiser.network.state_dict().items():
        assert torch.equal(value, finished["weights"][key])


def test_they_are_drawn_by_the_engine_and_saved_by_the_codec(
    run: RunFolder, tmp_path: Path
) -> None:
    model = str(run.path / "model")
    calls = ENGINE.num_calls
    counted = Request("a wave", model=model, steps=4, engine="counting", num_images=3, seed=5)
    eager = replace(counted, engine="eager", num_images=2, seed=6)
    first, second = Studio(device="cpu").submit([counted, eager])
    assert ENGINE.num_calls - calls == 4
    assert (CHANNELS * LENGTH, 1) in ENGINE.sizes
    assert [len(curve) for curve in first.images] == [CHANNELS * LENGTH] * 3
    # Two curves and three are different batches, which rounding tells apart.
    expected = torch.tensor(first.images[1:])
    torch.testing.assert_close(torch.tensor(second.images), expected, rtol=1e-4, atol=1e-3)
    paths = save_images(first, tmp_path)
    assert [path.suffix for path in paths] == [".json"] * 3
    written = json.loads(paths[2].read_text())
    assert written["values"] == first.images[2]
    assert json.loads(written["metadata"]["twostep"])["request"]["seed"] == 7


def test_a_plan_counts_what_they_train(recipe: DistillRecipe) -> None:
    planned = plan(recipe)
    size = sum(parameter.numel() for parameter in CurveNetwork().parameters())
    assert [stage.trained["student"] for stage in planned.stages] == [size, size]


def test_settings_of_another_method_are_refused(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    text = RECIPE.format(model=teacher).replace("power = 1.5", "r1_weight = 1.0")
    path.write_text(text)
    with pytest.raises(RecipeError, match="r1_weight"):
        load_recipe(path, DistillRecipe)
