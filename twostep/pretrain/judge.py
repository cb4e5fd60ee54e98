"""Training of the judge: cross-entropy of concept, style and background, and the squared error of
the blur.

It learns from real drawings only, composited and mildly damaged anew in every iteration. There is
one drawing per concept and style, so *held out* means: placements, backgrounds and damage that were
never drawn in training, not drawings that were never seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from twostep import __version__
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.judge import Classes, Judge, Origin, Verdict, load_judge, save_judge
from twostep.files import write_atomically
from twostep.pretrain.degradation import Degradation, degrade
from twostep.pretrain.descent import DescentSettings, silent, train
from twostep.pretrain.drawings import EmojiSet, Placement, compose
from twostep.training.loop import OnIteration, Randomness
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder

_HELD_OUT = -1
"""The iteration whose randomness is kept for held-out pictures: training never gets there."""


class JudgeSettings(Settings):
    """How a judge is built and trained."""

    name: str = Field("nano-judge", description="what the judge says it comes from")
    channels: tuple[int, ...] = Field(
        (32, 64, 112, 160), min_length=1, description="widths; each halves the picture"
    )
    loop: DescentSettings
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target spread over all classes"
    )
    degradation: Degradation = Field(
        Degradation(), description="damage to the pictures it learns from"
    )
    placement: Placement = Field(
        Placement(), description="how far drawings stray in the pictures it learns from"
    )
    num_held_out: int = Field(
        8, gt=0, description="held-out pictures per drawing, clean and again damaged"
    )


def train_judge(
    recipe: JudgeSettings, emoji: EmojiSet, out: Path, on_iteration: OnIteration = silent
) -> Judge:
    """Train a judge on composited drawings and write `judge.safetensors` and `eval.json` to the run
    folder `out`.

    The same call again resumes, or does nothing more than measure. The accuracy stated is that of
    the file as written. Raises RunError for a folder of another recipe, TrainingError for a loss
    that is not finite.
    """
    folder = RunFolder(out, recipe)
    judge = _fit(Judge(classes_of(emoji), recipe.channels), recipe, emoji, folder, on_iteration)
    path = out / "judge.safetensors"
    save_judge(judge, path)
    judge = load_judge(path)
    judge.real = judge.statistics(_held_out(emoji, recipe)[0])
    accuracy = measure_accuracy(judge, recipe, emoji)
    judge.origin = Origin(recipe.name, __version__, accuracy)
    save_judge(judge, path)
    with write_atomically(out / "eval.json") as file:
        file.write(json.dumps(accuracy, indent=2).encode())
    return load_judge(path)


def classes_of(emoji: EmojiSet) -> Classes:
    """Return the classes of pictures composed from a set of drawings."""
    return Classes(emoji.concepts, emoji.styles, tuple(BACKGROUNDS))


def measure_accuracy(judge: Judge, recipe: JudgeSettings, emoji: EmojiSet) -> dict[str, float]:
    """Return the shares of held-out pictures judged rightly, clean and damaged, and the mean error
    of the blur.
    """
    pictures, labels = _held_out(emoji, recipe)
    damaged, blur_pixels = degrade(
        pictures, recipe.degradation, Randomness.at(recipe.loop.seed, _HELD_OUT - 1).tensors
    )
    figures = _shares(judge.judge(pictures), labels)
    verdict = judge.judge(damaged)
    figures |= {f"{name}_damaged": share for name, share in _shares(verdict, labels).items()}
    error = (verdict.blur_pixels - blur_pixels).abs().mean()
    return figures | {"blur_error_pixels": round(float(error), 4)}


def _held_out(
    emoji: EmojiSet, recipe: JudgeSettings
) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "3 batch"]]:
    """Compose every drawing equally often, on random backgrounds."""
    num_drawings = len(emoji.concepts) * len(emoji.styles)
    drawing = torch.arange(num_drawings).repeat(recipe.num_held_out)
    return _compose(
        emoji, drawing, recipe.placement, Randomness.at(recipe.loop.seed, _HELD_OUT).tensors
    )


def _compose(
    emoji: EmojiSet,
    drawing: Int[Tensor, " batch"],
    placement: Placement,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "3 batch"]]:
    """Put drawings on random backgrounds; return them with their concept, style and background."""
    background = torch.randint(len(BACKGROUNDS), drawing.shape, generator=generator)
    drawings = emoji.drawings.flatten(0, 1)
    parts = zip(torch.split(drawing, 256), torch.split(background, 256), strict=True)
    pictures = torch.cat(
        [compose(drawings[part], behind, placement, generator) for part, behind in parts]
    )
    num_styles = len(emoji.styles)
    return pictures, torch.stack([drawing // num_styles, drawing % num_styles, background])


def _shares(verdict: Verdict, labels: Int[Tensor, "3 batch"]) -> dict[str, float]:
    logits = {"concept": verdict.concept, "style": verdict.style, "background": verdict.background}
    right = {
        name: logit.argmax(dim=1) == label
        for (name, logit), label in zip(logits.items(), labels, strict=True)
    }
    return {name: round(float(hits.float().mean()), 4) for name, hits in right.items()}


def _fit(
    judge: Judge,
    recipe: JudgeSettings,
    emoji: EmojiSet,
    folder: RunFolder,
    on_iteration: OnIteration,
) -> Judge:
    """Train in place, from the last checkpoint if there is one, and leave the averaged weights in
    the judge.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.loop.seed)
        judge.apply(_initialise)
    judge.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    num_drawings = len(emoji.concepts) * len(emoji.styles)

    def loss(iteration: int, draw: Randomness) -> Tensor:
        drawing = torch.randint(num_drawings, (recipe.loop.batch_size,), generator=draw.tensors)
        pictures, labels = _compose(emoji, drawing, recipe.placement, draw.tensors)
        pictures, blur_pixels = degrade(pictures, recipe.degradation, draw.tensors)
        verdict = judge(pictures.to(memory_format=torch.channels_last))
        return _loss(verdict, labels, blur_pixels, recipe.label_smoothing)

    train(judge, loss, recipe.loop, folder, "judge", on_iteration=on_iteration)
    return judge


def _loss(
    verdict: Verdict,
    labels: Int[Tensor, "3 batch"],
    blur_pixels: Float[Tensor, " batch"],
    smoothing: float,
) -> Float[Tensor, ""]:
    concept, style, background = (
        functional.cross_entropy(logits.float(), label, label_smoothing=smoothing)
        for logits, label in zip(
            (verdict.concept, verdict.style, verdict.background), labels, strict=True
        )
    )
    blur = (verdict.blur_pixels.float() - blur_pixels).square().mean()
    return concept + style + 0.5 * background + blur


def _initialise(module: torch.nn.Module) -> None:
    if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
        module.reset_parameters()
