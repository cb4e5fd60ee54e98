"""What a run will take, told before it starts: its phases are walked through on tensors without
memory.

The trainer itself takes one iteration of every kind of phase, and the storages that live at its
peak are added up. What torch's kernels take inside themselves, and the process for itself (half a
GiB), is unknown here.
"""

from __future__ import annotations

import gc
import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twostep.data.cache import read_shard
from twostep.distill.chain import lessons
from twostep.distill.methods.discriminator import LoraDiscriminator
from twostep.distill.recipe import DistillRecipe, Phase
from twostep.distill.samples import Examples
from twostep.distill.trainer import AdversarialTrainer, Lesson, RegressionTrainer
from twostep.models.loading import load_bundle
from twostep.networks.adapters import remove_lora
from twostep.networks.conditioning import Conditioning
from twostep.training.device import find_device
from twostep.training.loop import Randomness
from twostep.training.memory import Meter, computing_off_cpu

_TELLING = {
    "objective",
    "batch_size",
    "precision",
    "lora_rank",
    "discriminator_lora",
    "r1_weight",
    "reuse",
}


@dataclass(frozen=True)
class PhasePlan:
    """One phase: the teacher's evaluations per example, trained parameters by role, bytes by what
    they are for.

    `peak` is the most bytes at once in an iteration, `pictures` while a checkpoint's are drawn.
    """

    phase: Phase
    evaluations: float
    trained: dict[str, int]
    memory: dict[str, int]
    peak: int
    pictures: int

    @property
    def highest(self) -> int:
        """The larger of the two peaks."""
        return max(self.peak, self.pictures)


def plan(recipe: DistillRecipe, *, only: int | None = None) -> tuple[list[PhasePlan], int, int]:
    """Return the plan of all phases or one, bytes of an item of data, and how many items there are
    (0 if unknown).

    Raises ModelError where not even the model's configs are to be had.
    """
    shards = (
        [read_shard(path) for path in sorted(recipe.cache.glob("shard-*.safetensors"))]
        if recipe.cache
        else []
    )
    is_cpu = "cpu" in (find_device("auto").type if recipe.device == "auto" else recipe.device)
    planned, known = [], dict[str, tuple[dict[str, int], int, int]]()
    with (
        warnings.catch_warnings(),
        Meter() as meter,
        nullcontext() if is_cpu else computing_off_cpu(),
    ):
        # Copying a network asks where its weights lie, which is nowhere here.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        teacher = load_bundle(recipe.model, steps=recipe.model_steps, outline=True).as_teacher()
        if recipe.base_precision == "bf16":
            nn.Module.to(teacher.denoiser.network, torch.bfloat16)
        start = None
        if recipe.starts_apart:
            start = load_bundle(recipe.model, steps=recipe.start_steps, outline=True).denoiser
            nn.Module.to(start.network, teacher.denoiser.dtype)
        size = teacher.contract.sizes[0]
        shape, told = teacher.latent_shape(*size), teacher.conditioning([""], *size)
        blank = _Blank(
            max(((shape[0], *shard.size[::-1]) for shard in shards), key=math.prod, default=shape),
            told,
        )
        drawing = _draw(Examples.of(teacher, recipe.sample_prompts), meter)
        if recipe.cache is not None and not is_cpu:
            for weight in (
                weight
                for encoder in teacher.text.networks.values()
                for weight in encoder.parameters()
            ):
                weight.data = torch.empty(0)  # on another device than what is counted
        for position, (phase, lesson, _) in enumerate(lessons(recipe, teacher, blank, start=start)):
            if only in (None, position):
                gc.collect()
                standing = meter.living
                kind = f"{phase.model_dump(include=_TELLING)} {phase.guidance > 1} {phase.gradient_checkpointing}"
                known[kind] = known.get(kind) or _measure(phase, lesson, meter)
                planned.append(_planned(phase, standing, *known[kind], drawing))
    num_values = math.prod(blank.latents) + (
        told.text.numel() + told.pooled.numel() if recipe.cache else 0
    )
    return planned, 2 * num_values + (24 if recipe.cache else 3), sum(map(len, shards))


def advise(recipe: DistillRecipe, position: int) -> list[tuple[dict[str, Any], int]]:
    """Return changes that make a phase smaller, with its peak after each: the best first, and all
    together last.
    """
    phase = recipe.phases[position]
    rank = phase.lora_rank
    changes: list[tuple[bool, dict[str, Any]]] = [
        (phase.batch_size > 1, {"batch_size": phase.batch_size // 2}),
        (not phase.gradient_checkpointing, {"gradient_checkpointing": True}),
        (phase.precision == "fp32", {"precision": "bf16"}),
        (rank is not None and recipe.base_precision == "fp32", {"base_precision": "bf16"}),
        (phase.optimiser == "adamw", {"optimiser": "adamw8bit"}),
        (phase.student_steps > 1 and rank != 1, {"lora_rank": rank // 2 if rank else 64}),
        (
            rank is not None and phase.judges and not phase.discriminator_lora,
            {"discriminator_lora": True},
        ),
    ]
    useful = [change for helps, change in changes if helps]
    together = {key: value for change in useful for key, value in change.items()}
    *peaks, least = [
        (change, _changed_peak(recipe, position, change)) for change in (*useful, together)
    ]
    return [*sorted(peaks, key=lambda found: found[1]), least]


def _changed_peak(recipe: DistillRecipe, position: int, change: dict[str, Any]) -> int:
    """Return a phase's peak if it is changed so, and with it all that train a LoRA, or a whole
    UNet, as it does.
    """
    phases, chosen = list(recipe.phases), recipe.phases[position]
    for i, phase in enumerate(phases):
        if i == position or (
            phase.student_steps > 1 and (phase.lora_rank is None) == (chosen.lora_rank is None)
        ):
            phases[i] = phase.model_copy(update=change)
    (changed,), *_ = plan(
        recipe.model_copy(update={**change, "phases": tuple(phases)}), only=position
    )
    return changed.highest


def _planned(
    phase: Phase, standing: int, trained: dict[str, int], added: int, kept: int, drawing: int
) -> PhasePlan:
    num_steps = 1 if phase.objective == "convert" else phase.teacher_steps // phase.student_steps
    kept *= math.ceil(phase.iterations / phase.reuse) - 1
    own, moments = 4 * trained["student"], 8 if phase.optimiser == "adamw" else 2
    memory = {"frozen weights": standing - own, "kept batches": kept, "student average": own}
    for role, count in trained.items():
        memory |= {f"{role} weights": 4 * count, f"{role} moments": moments * count}
    # beside the averaged weights, the student's own are put aside
    pictures = sum(memory.values()) + own + drawing
    memory["gradients, of one at a time"] = 4 * max(trained.values())
    peak = standing + added + kept - (8 - moments) * sum(trained.values())
    memory["activations"] = max(0, peak - sum(memory.values()))
    evaluations = num_steps * (2 if phase.guidance > 1 else 1) / phase.reuse
    return PhasePlan(phase, evaluations, trained, memory, peak, pictures)


def _measure(phase: Phase, lesson: Lesson, meter: Meter) -> tuple[dict[str, int], int, int]:
    """Return parameters by role, and what an iteration after the first adds at its peak, and leaves
    behind.
    """
    before = meter.living
    # A teacher keeps nothing but latents from one of its evaluations to the next, so one will do;
    # what steps in 8 bits
    # knows no tensors without memory.
    phase = phase.model_copy(update={"teacher_steps": phase.student_steps, "optimiser": "adamw"})
    trainer = (
        AdversarialTrainer(phase, lesson) if phase.judges else RegressionTrainer(phase, lesson)
    )
    learning: dict[str, tuple[Any, torch.optim.Optimizer]] = {
        "student": (lesson.trained, trainer.optimiser)
    }
    if isinstance(trainer, AdversarialTrainer):
        learning["discriminator"] = trainer.discriminator, trainer.discriminator_optimiser
    for trained, optimiser in learning.values():
        for parameter in trained.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
        optimiser.zero_grad()
    meter.peak = standing = meter.living
    trainer.iterate(0, Randomness.at(0, 0))
    kept = meter.living - standing if phase.reuse > 1 else 0
    counts = {
        role: sum(p.numel() for p in trained.parameters())
        for role, (trained, _) in learning.items()
    }
    remove_lora(lesson.teacher.network, LoraDiscriminator.NAME)
    return counts, meter.peak - before, kept


def _draw(examples: Examples, meter: Meter) -> int:
    """Return what drawing adds, by the teacher with its guidance."""
    before, teacher = meter.living, examples.teacher
    meter.peak = before
    examples.draw(
        lambda told: teacher.denoiser.with_guidance(told, told, teacher.contract.guidance), 1
    )
    return meter.peak - before


@dataclass(frozen=True)
class _Blank:
    """A source of nothing, in the shapes of what a run draws."""

    latents: tuple[int, ...]
    told: Conditioning

    def draw(self, count: int, tensors: object, words: object) -> tuple[Tensor, Conditioning]:
        return torch.empty(count, *self.latents), Conditioning.cat([self.told] * count)

    def empty(self, like: Conditioning) -> Conditioning:
        return Conditioning.cat([self.told] * len(like))
