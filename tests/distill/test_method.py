"""The seam: a method, a backbone and a source from this file train by the package's trainer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from twostep.diffusion import VariancePreserving, trained_times
from twostep.distill import trainer
from twostep.distill.method import ContractChanges, Cost, Limit, Method, MethodSettings, Models
from twostep.distill.methods.registry import find_method, method_names, register_method
from twostep.distill.pairs import Batches
from twostep.distill.recipe import Stage
from twostep.distill.roles import OptimiserSettings, Role, copy_of, learner, moving_average_of
from twostep.distill.trainer import StageTrainer, train_stage
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Randomness
from twostep.training.offload import OffloadedState
from twostep.training.run_folder import RunFolder


class Line(nn.Module):
    """A backbone of sounds: one channel, one number per time step."""

    spec = BackboneSpec(family="line", in_channels=1, out_channels=1)

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.weight * x


class Sounds:
    """Latents of noise, and conditioning that says nothing."""

    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        nothing = Conditioning(
            torch.zeros(count, 1, 0), torch.zeros(count, 0), torch.zeros(count, 6)
        )
        return torch.randn(count, 1, 1, 8, generator=tensors), nothing

    def empty(self, like: Conditioning) -> Conditioning:
        return like


class ChaseSettings(MethodSettings):
    """What the toy method can be told."""

    decay: float = 0.5
    inner_steps: int = 2


@dataclass(frozen=True)
class Chased:
    """Noisy latents, and noise for every turn."""

    x_t: Tensor
    t: Tensor
    conditioning: Conditioning


class Chase(Method[Chased]):
    """The student chases a critic that chases the teacher; a target follows the student.

    It has every kind of role that LCM (a moving average) and DMD2 (a copy with several steps a
    turn) need.
    """

    name: ClassVar[str] = "chase"
    Settings: ClassVar[type[MethodSettings]] = ChaseSettings

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.settings = stage.method
        self.seen: list[str] = []

    def roles(self, teacher: Denoiser, student: Denoiser) -> Mapping[str, Role]:
        return {
            "student": learner(student, OptimiserSettings.of(self.stage)),
            "critic": copy_of(
                teacher, OptimiserSettings.of(self.stage, betas=(0.0, 0.9), learning_rate=1e-2)
            ),
            "target": moving_average_of(
                "student", student, name="target", decay=self.settings.decay
            ),
        }

    def draw(self, iteration: int, batches: Batches, models: Models, random: Randomness) -> Chased:
        x0, conditioning = batches.examples(random)
        t = batches.share(torch.full((batches.batch_size,), 500))
        eps = batches.noise(x0, random)
        return Chased(models["teacher"].schedule.add_noise(x0, eps, t), t, conditioning)

    def turns(self, iteration: int) -> Sequence[str]:
        critics = ["critic"] * self.settings.inner_steps
        # The student only in every other iteration.
        return (*critics, "student") if iteration % 2 else critics

    def loss(self, role: str, pair: Chased, models: Models) -> Mapping[str, Tensor]:
        self.seen.append(role)
        learning = {"critic": ("critic", "teacher"), "student": ("student", "critic")}[role]
        answer, aim = (models[name](pair.x_t, pair.t, pair.conditioning).eps for name in learning)
        if role == "student":
            critic = models["critic"].network
            assert not any(parameter.requires_grad for parameter in critic.parameters())
        return {"total": (answer - aim.detach()).square().mean(), "size": answer.abs().mean()}

    def describe(self, last_student: Denoiser) -> ContractChanges:
        times = trained_times(self.stage.student_steps, last_student.schedule)
        return ContractChanges(last_student.prediction_type, times, "renoise")

    def limits(self) -> Mapping[str, Limit]:
        return {"size": Limit(100.0, "a chase that got away")}

    def cost(self) -> Cost:
        return Cost(1.0)


def make_stage(name: str = "chase", **changes: object) -> Stage:
    values = {
        "student_steps": 4,
        "method": {"name": name},
        "iterations": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_iterations": 0,
        "precision": "fp32",
        "checkpoint_every": 2,
        "log_every": 1,
        "ema_decay": 0.5,
    }
    return Stage.model_validate(values | changes)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_method(Chase)


def denoiser(weight: float) -> Denoiser:
    return Denoiser(Line(weight), VariancePreserving.scaled_linear())


def test_it_trains_and_its_average_follows() -> None:
    trainer = StageTrainer(make_stage(), Sounds(), denoiser(0.5), denoiser(0.0))
    figures = [trainer.iterate(i, Randomness.at(0, i)) for i in range(2)]
    assert trainer.method.seen == ["critic"] * 4 + ["student"]
    assert set(figures[0]) == {"critic_loss", "critic_grad_norm", "critic_rate", "size"}
    of_student = {"student_loss", "student_grad_norm", "student_rate"}
    assert set(figures[1]) == {*figures[0], *of_student}
    assert figures[1]["student_rate"] == make_stage().learning_rate
    student, target = (trainer.models[name].network.weight for name in ("student", "target"))
    assert student > 0
    # Half of the way that the student's only step has gone.
    torch.testing.assert_close(target.detach(), 0.5 * student.detach())
    assert set(trainer.state) == {
        *("student", "critic", "target", "average", "student_optimiser", "critic_optimiser")
    }


@pytest.mark.parametrize(
    ("optimiser", "settings"),
    [
        ("adamw", {}),
        ("adamw", {"schedule": "cosine", "restarts": 1, "betas": (0.5, 0.8), "eps": 1e-3}),
        ("adamw8bit", {"schedule": "linear"}),
        ("adafactor", {"schedule": "cosine"}),
        ("prodigy", {"learning_rate": 1.0, "warmup_iterations": 2}),
        ("lion", {"weight_decay": 0.1}),
    ],
)
def test_it_resumes_bit_for_bit(
    optimiser: str, settings: dict[str, object], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 5:
            raise Killed

    stage = make_stage(optimiser=optimiser, **settings)
    whole, cut, resumed = (denoiser(0.0) for _ in range(3))
    train_stage(stage, Sounds(), denoiser(0.5), whole, RunFolder(tmp_path / "whole", stage))
    folder = tmp_path / "cut"
    with pytest.raises(Killed):
        train_stage(stage, Sounds(), denoiser(0.5), cut, RunFolder(folder, stage), on_iteration=die)
    train_stage(stage, Sounds(), denoiser(0.5), resumed, RunFolder(folder, stage))
    assert torch.equal(whole.network.weight, resumed.network.weight)
    assert whole.network.weight > 0
    one, other = (
        [
            {key: value for key, value in json.loads(line).items() if key.endswith("_rate")}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "cut")
    )
    assert all(line in one for line in other), "the same rates, of prodigy too"


def test_offloaded_a_stage_trains_and_resumes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, offloaded = denoiser(0.0), denoiser(0.0)
    stage = make_stage()
    train_stage(stage, Sounds(), denoiser(0.5), plain, RunFolder(tmp_path / "plain", stage))
    # As if this were an accelerator.
    monkeypatch.setattr(trainer, "has_own_memory", lambda device: True)
    stage = make_stage(offload=True)
    first = make_stage(offload=True, iterations=4)
    folder = tmp_path / "offloaded"
    train_stage(first, Sounds(), denoiser(0.5), denoiser(0.0), RunFolder(folder, first))
    train_stage(stage, Sounds(), denoiser(0.5), offloaded, RunFolder(folder, stage))
    assert torch.equal(plain.network.weight, offloaded.network.weight)
    made = StageTrainer(stage, Sounds(), denoiser(0.5), denoiser(0.0))
    assert isinstance(made.state["student_optimiser"], OffloadedState)
    assert isinstance(made.state["critic_optimiser"], OffloadedState)


def test_methods_are_found_by_name_and_by_place() -> None:
    assert {"adversarial", "chase", "conversion", "regression"} <= set(method_names())
    assert find_method("chase") is Chase
    place = "twostep.distill.methods.regression:Regression"
    assert find_method(place) is find_method("regression")
    stage = make_stage(place, teacher_steps=8)
    assert stage.name == "4-regression"
    assert Stage.model_validate(stage.model_dump(mode="json", exclude_none=True)) == stage


def test_a_name_is_taken_once() -> None:
    class Impostor(Chase):
        pass

    with pytest.raises(ValueError, match="there is a method named 'chase' already"):
        register_method(Impostor)
    Impostor.name = "regression"
    with pytest.raises(ValueError, match="choose another name"):
        register_method(Impostor)
