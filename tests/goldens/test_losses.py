"""Golden losses: three iterations of every method, of a whole UNet and of a LoRA, give what they
gave when written.

`python -m tests.goldens.test_losses` prints them anew. Whoever changes one says in the commit why.
The tolerance is relative alone: it catches a change of a tenth of a percent in the smallest of
these losses.
"""

import copy
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.networks.adapters import Lora, add_lora
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.model import random_bundle
from twostep.text.clip import TextEncoders
from twostep.training.loop import Randomness

GOLDEN = Path(__file__).with_name("losses.json")
RELATIVE = 1e-3

GAP = "gap"
GAP_ABSOLUTE = 1e-5
"""The gap is the difference of logits around 1, and processors differ in their last bits."""


@dataclass(frozen=True)
class Case:
    """One stage with the settings that decide its losses."""

    name: str
    student_steps: int
    teacher_steps: int | None
    method: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


def adversarial(objective: str, **settings: Any) -> dict[str, Any]:
    return {"name": "lightning", "objective": objective, **settings}


REGRESSION = {"name": "regression"}
CONVERSION = {"name": "conversion"}
CONDITIONAL = adversarial("conditional")
AS_THE_PAPER = {
    "name": "adversarial",
    "objective": "conditional",
    "loss": "non-saturating",
    "levels": "mid",
    "discriminator_precision": "stage",
    "noised_weights": (1, 1, 1, 1),
}
LORA = {"lora_rank": 4}
CASES = (
    Case("32-mse", 32, 128, REGRESSION, {"guidance": 3.0}),
    Case("4-mse", 4, 8, REGRESSION),
    Case("4-mse-reuse", 4, 8, {**REGRESSION, "reuse": 3}),
    Case("8-conditional", 8, 32, CONDITIONAL),
    Case("4-conditional-r1", 4, 8, {**AS_THE_PAPER, "r1_weight": 1.0, "perturbation": 0.01}),
    Case("2-conditional", 2, 4, adversarial("conditional", discriminator_learning_rate=1e-3)),
    Case("2-unconditional", 2, 8, adversarial("unconditional")),
    Case("1-convert", 1, None, CONVERSION),
    Case("1-mse", 1, 2, REGRESSION),
    Case("1-unconditional", 1, 4, adversarial("unconditional", early_weight=5)),
    Case("8-mse-lora", 8, 32, REGRESSION, LORA),
    Case("8-conditional-lora", 8, 32, CONDITIONAL, LORA),
    Case("4-unconditional-lora", 4, 8, adversarial("unconditional", discriminator_lora=True), LORA),
    Case("2-conditional-lora", 2, 4, adversarial("conditional", discriminator_lora=True), LORA),
)
"""Named as when the losses were written."""

NAMES = {
    "regression": {"student_loss": "loss", "student_grad_norm": "gradient"},
    "adversarial": {
        "student_loss": "student",
        "discriminator_loss": "discriminator",
        "gap": "gap",
        "student_grad_norm": "student_gradient",
        "discriminator_grad_norm": "discriminator_gradient",
    },
}
NAMES["lightning"] = NAMES["adversarial"]
NAMES["conversion"] = NAMES["regression"]
"""What the figures were called when they were written. Left out are counts of signs, which one
logit near zero would tip.
"""
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
    """Return the figures of the third iteration by the names that they had."""
    stage = Stage.model_validate(
        {
            **COMMON,
            "student_steps": case.student_steps,
            "teacher_steps": case.teacher_steps,
            "method": case.method,
            **case.settings,
        }
    )
    student = replace(
        teacher.denoiser.with_network(copy.deepcopy(teacher.denoiser.network)),
        prediction_type=stage.make_method().describe(teacher.denoiser).prediction_type,
    )
    teaching = teacher.denoiser
    if stage.lora_rank is None:
        student.network.requires_grad_(True)
    else:
        add_lora(student.network, "student", rank=stage.lora_rank)
        Lora(student.network, "student").requires_grad_(True)
        teaching, student = student, replace(student, lora="student")
    trainer = StageTrainer(stage, Latents(teacher.text), teaching, student)
    for iteration in range(3):
        figures = trainer.iterate(iteration, Randomness.at(stage.seed, iteration))
    names = NAMES[case.method["name"]]
    return {old: float(figures[new]) for new, old in names.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_are_what_they_were(case: Case) -> None:
    golden = json.loads(GOLDEN.read_text())[case.name]
    figures = third_iteration(case, random_bundle())
    if GAP in golden:
        assert figures.pop(GAP) == pytest.approx(golden.pop(GAP), rel=RELATIVE, abs=GAP_ABSOLUTE)
    assert figures == pytest.approx(golden, rel=RELATIVE, abs=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    written = {case.name: third_iteration(case, random_bundle()) for case in CASES}
    GOLDEN.write_text(json.dumps(written, indent=2) + "\n")
