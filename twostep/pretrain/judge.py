"""The training of the judge: it names concept, style and background, and estimates the blur.

It learns from real drawings only, composed and mildly damaged anew in every iteration. There is one
drawing per concept and style, so *held out* means: placements, backgrounds and damage that were
never drawn in training, not drawings that were never seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from twostep import __version__
from twostep.diffusion.shapes import sent
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.judge import Classes, Judge, Origin, Verdict, load_judge, save_judge
from twostep.files import write_atomically
from twostep.pretrain.degradation import Degradation, degrade
from twostep.pretrain.drawings import DrawingSet, Placement, compose, random_backgrounds
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.sizes import find_size
from twostep.training.device import find_device
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import wait, world
from twostep.training.run_folder import RunFolder

_HELD_OUT = -1
"""The iteration whose randomness is kept for held-out pictures: training never gets there."""

_HELD_OUT_DAMAGE = -2
"""The same for the damage that held-out pictures get."""

_BACKGROUND_WEIGHT = 0.5
"""Backgrounds are learnt soonest and need the least of the network."""


class JudgeSettings(PartSettings):
    """The recipe of a judge."""

    part: Literal["judge"] = "judge"
    name: str = Field("nano-judge", description="what the judge says it comes from")
    channels: tuple[int, ...] = Field(
        (32, 64, 112, 160), min_length=1, description="widths; each halves the picture"
    )
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
    settings: JudgeSettings,
    drawings: DrawingSet,
    out: Path,
    on_iteration: OnIteration = silent,
) -> Judge:
    """Train a judge and write `judge.safetensors` and `eval.json` to the run folder `out`.

    The same call again resumes, or does nothing more than measure. The accuracy stated is that of
    the file as written.

    Raises:
        RunError: the folder holds a run of another recipe.
        TrainingError: the loss is not finite.
    """
    folder = RunFolder(out, settings)
    settings = folder.settled(settings)
    judge = new_judge(settings, drawings)
    _fit(judge, settings, drawings, folder, on_iteration=on_iteration)
    path = out / "judge.safetensors"
    if world().is_first:
        judge.cpu()
        save_judge(judge, path)
        # Read back, because in the file weights are of half precision.
        judge = load_judge(path)
        judge.real = judge.statistics(_held_out(drawings, settings)[0])
        accuracy = measure_accuracy(judge, settings, drawings)
        judge.origin = Origin(settings.name, __version__, accuracy)
        save_judge(judge, path)
        with write_atomically(out / "eval.json") as file:
            file.write(json.dumps(accuracy, indent=2).encode())
    wait()
    return load_judge(path)


def new_judge(settings: JudgeSettings, drawings: DrawingSet) -> Judge:
    """Return a judge of these drawings with random weights; global randomness stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        judge = Judge(classes_of(drawings), settings.channels, find_size(settings.size).pixels)
        # Weights are drawn from the seed alone, however many draws the constructor took.
        torch.manual_seed(settings.loop.seed)
        judge.apply(_initialise)
    return judge


def classes_of(drawings: DrawingSet) -> Classes:
    """Return the classes of pictures that are composed from a set of drawings."""
    return Classes(drawings.concepts, drawings.styles, tuple(BACKGROUNDS))


def measure_accuracy(
    judge: Judge, settings: JudgeSettings, drawings: DrawingSet
) -> dict[str, float]:
    """Return the shares of held-out pictures judged rightly, clean and damaged.

    `blur_error_pixels` is the mean error of the estimated blur.
    """
    pictures, labels = _held_out(drawings, settings)
    generator = Randomness.at(settings.loop.seed, _HELD_OUT_DAMAGE).tensors
    damaged, blur_pixels = degrade(pictures, settings.degradation, generator)
    figures = _shares_right(judge.judge(pictures), labels)
    verdict = judge.judge(damaged)
    for name, share in _shares_right(verdict, labels).items():
        figures[f"{name}_damaged"] = share
    error = (verdict.blur_pixels - blur_pixels).abs().mean()
    figures["blur_error_pixels"] = round(float(error), 4)
    return figures


def _fit(
    judge: Judge,
    settings: JudgeSettings,
    drawings: DrawingSet,
    folder: RunFolder,
    *,
    on_iteration: OnIteration,
) -> None:
    """Train in place, and leave the averaged weights in the judge.

    Of several processes each normalises with the statistics of its share, so figures differ a
    little with their number; the running statistics kept are those of the first.
    """
    device = find_device(settings.device)
    judge.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    num_drawings = len(drawings.concepts) * len(drawings.styles)
    batch_size = settings.loop.batch_size

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        share = world().share(batch_size)
        numbers = torch.randint(num_drawings, (batch_size,), generator=generator)
        pictures, labels = _compose(
            drawings, numbers, settings.placement, generator, pixels=judge.pixels
        )
        pictures, blur_pixels = degrade(pictures, settings.degradation, generator)
        shown = sent(pictures[share], device).to(memory_format=torch.channels_last)
        verdict = judge(shown)
        return _loss(
            verdict,
            sent(labels[:, share], device),
            sent(blur_pixels[share], device),
            settings.label_smoothing,
        )

    train_network(judge, loss, settings.loop, folder, name="judge", on_iteration=on_iteration)


def _loss(
    verdict: Verdict,
    labels: Int[Tensor, "3 batch"],
    blur_pixels: Float[Tensor, " batch"],
    smoothing: float,
) -> Float[Tensor, ""]:
    """Return the cross-entropies of the three heads and the squared error of the blur, summed."""

    def entropy(logits: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(logits.float(), label, label_smoothing=smoothing)

    concept = entropy(verdict.concept, labels[0])
    style = entropy(verdict.style, labels[1])
    background = entropy(verdict.background, labels[2])
    blur = (verdict.blur_pixels.float() - blur_pixels).square().mean()
    return concept + style + _BACKGROUND_WEIGHT * background + blur


def _held_out(
    drawings: DrawingSet, settings: JudgeSettings
) -> tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, "3 batch"]]:
    """Compose every drawing equally often, on random backgrounds."""
    num_drawings = len(drawings.concepts) * len(drawings.styles)
    return _compose(
        drawings,
        torch.arange(num_drawings).repeat(settings.num_held_out),
        settings.placement,
        Randomness.at(settings.loop.seed, _HELD_OUT).tensors,
        pixels=find_size(settings.size).pixels,
    )


def _compose(
    drawings: DrawingSet,
    numbers: Int[Tensor, " batch"],
    placement: Placement,
    generator: torch.Generator,
    *,
    pixels: int,
) -> tuple[Float[Tensor, "batch 3 pixels pixels"], Int[Tensor, "3 batch"]]:
    """Put drawings on random backgrounds; return them with concept, style and background."""
    background = random_backgrounds(len(numbers), generator)
    flat = drawings.drawings.flatten(0, 1)
    # In parts, for drawings are larger than the pictures that they become.
    parts = zip(numbers.split(256), background.split(256), strict=True)
    pictures = [
        compose(flat[part], behind, placement, generator, pixels=pixels) for part, behind in parts
    ]
    num_styles = len(drawings.styles)
    labels = torch.stack([numbers // num_styles, numbers % num_styles, background])
    return torch.cat(pictures), labels


def _shares_right(verdict: Verdict, labels: Int[Tensor, "3 batch"]) -> dict[str, float]:
    """Return the share of right answers of every head."""
    logits = {"concept": verdict.concept, "style": verdict.style, "background": verdict.background}
    shares = {}
    for (name, answers), label in zip(logits.items(), labels, strict=True):
        hits = answers.argmax(dim=1) == label
        shares[name] = round(float(hits.float().mean()), 4)
    return shares


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        module.reset_parameters()
