"""Training of the judge: cross-entropy of concept, style and background, and the squared error of the blur.

It learns from real drawings only, composited and mildly damaged anew in every iteration. There is one drawing per
concept and style, so *held out* means: placements, backgrounds and damage that were never drawn in training, not
drawings that were never seen. Every iteration seeds its own randomness, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from twostep import __version__
from twostep.data.captions import BACKGROUNDS
from twostep.data.emoji import EmojiSet, Placement, compose
from twostep.errors import TwostepError
from twostep.evaluate.degradation import Degradation, degrade
from twostep.evaluate.judge import Classes, Judge, Origin, Verdict, load_judge
from twostep.runs.folder import RunFolder, write_whole
from twostep.runs.recipe import Settings

_CHECKPOINT = "judge"
_HELD_OUT = 2**40
"""Added to the seed of held-out pictures: training never gets there."""

OnProgress = Callable[[int, int, float], None]
"""(iterations done, iterations in all, loss)."""


class JudgeTrainingError(TwostepError):
    """Training of the judge cannot go on."""


class JudgeRecipe(Settings):
    """How a judge is built and trained."""

    part: Literal["judge"] = Field("judge", description="which part of the model this recipe trains")
    name: str = Field("nano-judge", description="what the judge says it comes from")
    channels: tuple[int, ...] = Field((32, 64, 112, 160), min_length=1, description="widths; each halves the picture")
    iterations: int = Field(2100, gt=0, description="number of optimiser steps")
    batch_size: int = Field(64, gt=1, description="pictures per step")
    learning_rate: float = Field(4e-3, gt=0, description="peak learning rate of AdamW")
    warmup_iterations: int = Field(100, ge=0, description="linear warm-up; then a cosine to zero")
    weight_decay: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay, of convolutions and heads")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="decay per step of the averaged weights that are kept")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="autocast precision of forward passes")
    degradation: Degradation = Field(Degradation(), description="damage to the pictures it learns from")
    num_held_out: int = Field(8, gt=0, description="held-out pictures per drawing, clean and again damaged")
    checkpoint_every: int = Field(100, gt=0, description="iterations between checkpoints")
    log_every: int = Field(20, gt=0, description="iterations between lines of the log")
    seed: int = Field(0, ge=0, lt=2**20, description="seed of everything random")


def train_judge(
    recipe: JudgeRecipe, emoji: EmojiSet, out: Path, on_progress: OnProgress = lambda done, total, loss: None
) -> Judge:
    """Train a judge on composited drawings and write `judge.safetensors` and `eval.json` to the run folder `out`.

    The same call again resumes, or does nothing more than measure. The accuracy stated is that of the file as
    written. Raises RunError for a folder of another recipe, JudgeTrainingError for a loss that is not finite.
    """
    folder = RunFolder(out, recipe)
    judge = Judge(Classes.from_emoji(emoji), recipe.channels)
    _fit(judge, recipe, emoji, folder, on_progress)
    path = out / "judge.safetensors"
    judge.save(path)
    judge = load_judge(path)
    judge.real = judge.statistics(_held_out(emoji, recipe)[0])
    accuracy = measure_accuracy(judge, recipe, emoji)
    judge.origin = Origin(recipe.name, __version__, accuracy)
    judge.save(path)
    with write_whole(out / "eval.json") as file:
        file.write(json.dumps(accuracy, indent=2).encode())
    return load_judge(path)


def measure_accuracy(judge: Judge, recipe: JudgeRecipe, emoji: EmojiSet) -> dict[str, float]:
    """Return the shares of held-out pictures judged rightly, clean and damaged, and the mean error of the blur."""
    pictures, labels = _held_out(emoji, recipe)
    generator = _generator(recipe, _HELD_OUT + 1)
    damaged, blur_pixels = degrade(pictures, recipe.degradation, generator)
    figures = _shares(judge.judge(pictures), labels)
    verdict = judge.judge(damaged)
    figures |= {f"{name}_damaged": share for name, share in _shares(verdict, labels).items()}
    error = (verdict.blur_pixels - blur_pixels).abs().mean()
    return figures | {"blur_error_pixels": round(float(error), 4)}


def _held_out(emoji: EmojiSet, recipe: JudgeRecipe) -> tuple[Float[Tensor, "batch 3 64 64"], Int[Tensor, "3 batch"]]:
    """Compose every drawing equally often, on random backgrounds."""
    num_drawings = len(emoji.concepts) * len(emoji.styles)
    drawing = torch.arange(num_drawings).repeat(recipe.num_held_out)
    return _compose(emoji, drawing, _generator(recipe, _HELD_OUT))


def _compose(
    emoji: EmojiSet, drawing: Int[Tensor, " batch"], generator: torch.Generator
) -> tuple[Float[Tensor, "batch 3 64 64"], Int[Tensor, "3 batch"]]:
    """Put drawings on random backgrounds; return them with their concept, style and background."""
    background = torch.randint(len(BACKGROUNDS), drawing.shape, generator=generator)
    drawings = emoji.drawings.flatten(0, 1)
    parts = zip(torch.split(drawing, 256), torch.split(background, 256), strict=True)
    pictures = torch.cat([compose(drawings[part], behind, Placement(), generator) for part, behind in parts])
    num_styles = len(emoji.styles)
    return pictures, torch.stack([drawing // num_styles, drawing % num_styles, background])


def _generator(recipe: JudgeRecipe, iteration: int) -> torch.Generator:
    return torch.Generator().manual_seed((recipe.seed << 42) + iteration)


def _shares(verdict: Verdict, labels: Int[Tensor, "3 batch"]) -> dict[str, float]:
    logits = {"concept": verdict.concept, "style": verdict.style, "background": verdict.background}
    right = {name: logit.argmax(dim=1) == label for (name, logit), label in zip(logits.items(), labels, strict=True)}
    return {name: round(float(hits.float().mean()), 4) for name, hits in right.items()}


def _fit(judge: Judge, recipe: JudgeRecipe, emoji: EmojiSet, folder: RunFolder, on_progress: OnProgress) -> None:
    """Train in place, from the last checkpoint if there is one, and leave the averaged weights in the judge."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        judge.apply(_initialise)
    judge.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(_parameter_groups(judge, recipe.weight_decay), lr=recipe.learning_rate, fused=True)
    average = {key: value.detach().clone() for key, value in judge.state_dict().items()}
    start = _resume(folder.load(_CHECKPOINT), judge, optimiser, average)
    began = time.monotonic()
    for done in range(start + 1, recipe.iterations + 1):
        loss = _iterate(judge, recipe, emoji, optimiser, done - 1)
        _update_average(average, judge, min(recipe.ema_decay, done / (done + 9)))
        on_progress(done, recipe.iterations, loss)
        if done % recipe.log_every == 0:
            seconds = (time.monotonic() - began) / (done - start)
            folder.log(iteration=done, loss=round(loss, 4), seconds_per_iteration=round(seconds, 4))
        if done % recipe.checkpoint_every == 0 or done == recipe.iterations:
            state = {"iteration": done, "judge": judge.state_dict(), "average": average}
            folder.save(_CHECKPOINT, {**state, "optimiser": optimiser.state_dict()})
    judge.load_state_dict(average)


def _iterate(
    judge: Judge, recipe: JudgeRecipe, emoji: EmojiSet, optimiser: torch.optim.Optimizer, iteration: int
) -> float:
    generator = _generator(recipe, iteration)
    num_drawings = len(emoji.concepts) * len(emoji.styles)
    drawing = torch.randint(num_drawings, (recipe.batch_size,), generator=generator)
    pictures, labels = _compose(emoji, drawing, generator)
    pictures, blur_pixels = degrade(pictures, recipe.degradation, generator)
    for group in optimiser.param_groups:
        group["lr"] = recipe.learning_rate * _decay(iteration, recipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
        verdict = judge(pictures.to(memory_format=torch.channels_last))
        loss = _loss(verdict, labels, blur_pixels, recipe.label_smoothing)
    if not bool(torch.isfinite(loss)):
        raise JudgeTrainingError(
            f"the loss is {loss.item()} at iteration {iteration}. The last checkpoint is whole: lower learning_rate "
            f"(now {recipe.learning_rate:g}) or set precision to fp32, and start it in another folder."
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()
    return loss.item()


def _loss(
    verdict: Verdict, labels: Int[Tensor, "3 batch"], blur_pixels: Float[Tensor, " batch"], smoothing: float
) -> Float[Tensor, ""]:
    concept, style, background = (
        functional.cross_entropy(logits.float(), label, label_smoothing=smoothing)
        for logits, label in zip((verdict.concept, verdict.style, verdict.background), labels, strict=True)
    )
    blur = (verdict.blur_pixels.float() - blur_pixels).square().mean()
    return concept + style + 0.5 * background + blur


def _decay(iteration: int, recipe: JudgeRecipe) -> float:
    if iteration < recipe.warmup_iterations:
        return (iteration + 1) / recipe.warmup_iterations
    progress = (iteration - recipe.warmup_iterations) / max(1, recipe.iterations - recipe.warmup_iterations)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _parameter_groups(judge: Judge, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and convolutions only; scales and biases are left alone."""
    parameters = list(judge.parameters())
    heavy = [parameter for parameter in parameters if parameter.ndim > 1]
    light = [parameter for parameter in parameters if parameter.ndim == 1]
    return [{"params": heavy, "weight_decay": weight_decay}, {"params": light, "weight_decay": 0.0}]


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
        module.reset_parameters()


def _resume(
    state: dict[str, Any] | None, judge: Judge, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    if state is None:
        return 0
    judge.load_state_dict(state["judge"])
    optimiser.load_state_dict(state["optimiser"])
    for key, value in state["average"].items():
        average[key].copy_(value)
    return int(state["iteration"])


def _update_average(average: dict[str, Tensor], judge: Judge, decay: float) -> None:
    for key, value in judge.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)
