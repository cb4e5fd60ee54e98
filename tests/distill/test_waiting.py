"""An iteration never waits for its device: no number is read, and nothing is copied to it blocking.

The device is torch's "meta", whose tensors have shapes and no values. Reading one fails there, as
reading it would wait on an accelerator.
"""

from __future__ import annotations

import copy
import traceback
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from twostep.diffusion import shapes
from twostep.distill import trainer as trainers
from twostep.distill.recipe import Stage
from twostep.distill.trainer import StageTrainer
from twostep.models.bundle import Bundle
from twostep.networks.adapters import add_lora
from twostep.training.loop import Randomness

from .test_trainer import CONDITIONAL, CONVERSION, REGRESSION, UNCONDITIONAL, make_stage

DEVICE = torch.device("meta")
LORA = {"lora_rank": 4}
METHODS = {
    "regression": {"method": REGRESSION, "guidance": 3.0},
    "conversion": {"method": CONVERSION, "teacher_steps": None, "student_steps": 1},
    "conditional": {"method": CONDITIONAL},
    "unconditional-lora": {"method": UNCONDITIONAL, **LORA},
    "penalized": {"method": {**CONDITIONAL, "r1_weight": 1.0}},
    "lcm": {"method": {"name": "lcm"}, "teacher_steps": None},
    "lcm-lora": {"method": {"name": "lcm"}, "teacher_steps": None, **LORA},
    "ladd": {"method": {"name": "ladd"}, "teacher_steps": None},
    "dmd2": {"method": {"name": "dmd2"}, "teacher_steps": None},
    "accumulated": {"method": CONDITIONAL, "accumulate": 2},
}


class Copies(TorchDispatchMode):
    """Notes whatever is copied to the device in such a way that the CPU waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            moves = args[0].device.type == "cpu" and result.device == DEVICE
            if moves and not kwargs.get("non_blocking"):
                self.blocking.append(_place())
        if func is torch.ops.aten.copy_.default:
            moves = args[1].device.type == "cpu" and args[0].device == DEVICE
            if moves and not (len(args) > 2 and args[2]):
                self.blocking.append(_place())
        return result


def _place() -> str:
    """Return the innermost line of the package that is being run."""
    lines = [frame for frame in traceback.extract_stack() if "/twostep/" in frame.filename]
    return f"{lines[-1].filename}:{lines[-1].lineno}: {lines[-1].line}"


@pytest.fixture(autouse=True)
def as_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_QUEUEING", ("cuda", "meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # The fused kernel does not know it.
    monkeypatch.setattr(
        trainers,
        "make_optimiser",
        lambda weights, rate, **_: torch.optim.AdamW(list(weights.parameters()), lr=rate),
    )


def make_trainer(stage: Stage, teacher: Bundle, source: object) -> StageTrainer:
    prediction_type = stage.make_method().describe(teacher.denoiser).prediction_type
    network = copy.deepcopy(teacher.denoiser.network)
    student = replace(teacher.denoiser.with_network(network), prediction_type=prediction_type)
    teaching = teacher.denoiser
    if stage.lora_rank is None:
        network.requires_grad_(True)
    else:
        add_lora(network, "student", rank=stage.lora_rank).requires_grad_(True)
        teaching, student = student, replace(student, lora="student")
    for denoiser in (teaching, student):
        torch.nn.Module.to(denoiser.network, DEVICE)
    return StageTrainer(stage, source, teaching, student, codec=teacher.codec)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "conditional" else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)
def test_an_iteration_waits_for_nothing(name: str, teacher: Bundle, source: object) -> None:
    trainer = make_trainer(make_stage(**METHODS[name]), teacher, source)
    with Copies() as copies:
        figures = [trainer.iterate(i, Randomness.at(0, i)) for i in range(2)]
    assert copies.blocking == []
    # All on one device, where they are read together.
    unread = {
        key: value for each in figures for key, value in each.items() if not key.endswith("_rate")
    }
    assert any(key.endswith("_loss") for key in unread)
    assert {key: value.device for key, value in unread.items()} == dict.fromkeys(unread, DEVICE)
