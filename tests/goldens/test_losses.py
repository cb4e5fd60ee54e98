"""Golden losses: three iterations of every objective, of a whole UNet and of a LoRA, give what they
gave when written.

`python -m tests.goldens.test_losses` prints them anew. Whoever changes one says in the commit why.
The tolerance is relative alone: it catches a change of a tenth of a percent in the smallest of
these losses.
"""

import copy
import json
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.nano.model import random_bundle
from twostep.distill.methods.discriminator import Discriminator, LoraDiscriminator
from twostep.distill.recipe import Phase
from twostep.distill.trainer import AdversarialTrainer, Lesson, RegressionTrainer
from twostep.models.bundle import Bundle
from twostep.networks.adapters import Lora, add_lora
from twostep.networks.conditioning import Conditioning
from twostep.text.clip import TextEncoders
from twostep.training.loop import Randomness

GOLDEN = Path(__file__).with_name("losses.json")
RELATIVE = 1e-3


@dataclass(frozen=True)
class Case:
    """One objective with the settings that decide its losses."""

    name: str
    objective: str
    student_steps: int
    teacher_steps: int
    settings: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("32-mse", "mse", 32, 128, {"guidance": 3.0}),
    Case("4-mse", "mse", 4, 8),
    Case("4-mse-reuse", "mse", 4, 8, {"reuse": 3}),
    Case("8-conditional", "conditional", 8, 32),
    Case("4-conditional-r1", "conditional", 4, 8, {"r1_weight": 1.0}),
    Case("2-conditional", "conditional", 2, 4, {"discriminator_learning_rate": 1e-3}),
    Case("2-unconditional", "unconditional", 2, 8),
    Case("1-convert", "convert", 1, 2),
    Case("1-mse", "mse", 1, 2),
    Case("1-unconditional", "unconditional", 1, 4, {"early_weight": 5}),
    Case("8-mse-lora", "mse", 8, 32, {"lora_rank": 4}),
    Case("8-conditional-lora", "conditional", 8, 32, {"lora_rank": 4}),
    Case(
        "4-unconditional-lora", "unconditional", 4, 8, {"lora_rank": 4, "discriminator_lora": True}
    ),
    Case("2-conditional-lora", "conditional", 2, 4, {"lora_rank": 4, "discriminator_lora": True}),
)
COMMON = {
    "iterations": 4,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "warmup_iterations": 1,
    "precision": "fp32",
    "checkpoint_every": 2,
    "log_every": 1,
    "ema_decay": 0.5,
}


class Latents:
    """Sixteen fixed latents of noise with one of two captions."""

    def __init__(self, text: TextEncoders) -> None:
        self.text = text
        self.latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        rows = torch.randint(16, (count,), generator=tensors)
        captions = [words.choice(("a red fox", "")) for _ in range(count)]
        return self.latents[rows], self.text.conditioning(captions, 64, 64)

    def empty(self, like: Conditioning) -> Conditioning:
        return self.text.conditioning([""], 64, 64).expand(len(like))


def third_iteration(case: Case, teacher: Bundle) -> dict[str, float]:
    """Return the figures of the third iteration, without counts of signs, which one logit near zero
    would tip.
    """
    settings = Phase.model_validate(
        {
            **COMMON,
            "student_steps": case.student_steps,
            "teacher_steps": case.teacher_steps,
            "objective": case.objective,
            **case.settings,
        }
    )
    predicts = settings.predicts("eps")
    student = replace(
        teacher.denoiser.with_network(copy.deepcopy(teacher.denoiser.network)),
        prediction_type=predicts,
    )
    teaching = teacher.denoiser
    make: Any = Discriminator
    if settings.lora_rank is None:
        student.network.requires_grad_(True)
    else:
        add_lora(student.network, "student", rank=settings.lora_rank)
        Lora(student.network, "student").requires_grad_(True)
        teaching, student = student, replace(student, lora="student")
        if settings.discriminator_lora:
            make = partial(LoraDiscriminator, rank=settings.lora_rank)
    lesson = Lesson(Latents(teacher.text), teaching, student, make)
    trainer = (AdversarialTrainer if settings.judges else RegressionTrainer)(settings, lesson)
    for iteration in range(3):
        figures = trainer.iterate(iteration, Randomness.at(settings.seed, iteration))
    return {name: value for name, value in figures.items() if name != "accuracy"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_what_they_were(case: Case) -> None:
    golden = json.loads(GOLDEN.read_text())[case.name]
    assert third_iteration(case, random_bundle()) == pytest.approx(golden, rel=RELATIVE, abs=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {case.name: third_iteration(case, random_bundle()) for case in CASES}
    GOLDEN.write_text(json.dumps(written, indent=2) + "\n")
