"""The trainer and its objectives on points in the plane, down to one step, in under a minute on two
cores.

    python examples/toy2d.py [--out toy2d.png]

The data are 25 sharp spots, so the teacher needs no training: what a perfect denoiser answers is a
softmax over the spots, and it teaches every stage itself, in 32 steps. The student is one small
network, too small for the steep map from noise to spots that few steps ask for, and this is where
MSE averages: it leaves points between the spots. Two chains start from the same 32-step student and
get the same number of examples: MSE alone, and MSE followed by a discriminator, which at 4, 2 and 1
steps need not keep to the teacher's flow. At 2 steps and 1 that puts more points on spots and
forgets some of the spots; at 8 and 4, MSE does better (docs/log.md has five seeds).

Trainer, objectives and sampler are the package's. Written here is what other data need: source,
denoiser, judge.
"""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import silu

from twostep.diffusion import (
    Denoise,
    Prediction,
    PredictionType,
    VariancePreserving,
    prediction_from_output,
    sample,
)
from twostep.distill.recipe import Objective, Phase
from twostep.distill.trainer import Lesson, train_phase
from twostep.networks.conditioning import Conditioning
from twostep.training.run_folder import RunFolder

DEVIATION = 0.05
SPOTS = 0.75 * torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0))
SPOT_NORMS = SPOTS.square().sum(1)
TEACHER_STEPS = 32
STUDENT_WIDTH, JUDGE_WIDTH = 32, 128
BATCH_SIZE = 256
NUM_POINTS = 4096


@dataclass(frozen=True)
class Stage:
    """One student: its steps and iterations, and the share of them that a discriminator judges,
    how, at which rate.
    """

    steps: int
    iterations: int
    objective: Objective
    share: float
    rate: float


FIRST_ITERATIONS = 1500
STAGES = (
    Stage(8, 400, "conditional", 0.25, 1e-4),
    Stage(4, 400, "unconditional", 0.5, 1e-3),
    Stage(2, 600, "unconditional", 0.5, 1e-3),
    Stage(1, 800, "unconditional", 0.6, 1e-3),
)


class Spots:
    """A source of points: [count, 2, 1, 1], as the trainer wants a channel, a height and a width of
    everything.
    """

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return points on random spots, and conditioning that says nothing."""
        centres = SPOTS[torch.randint(len(SPOTS), (count,), generator=tensors)]
        points = centres + DEVIATION * torch.randn(count, 2, generator=tensors)
        return points.view(count, 2, 1, 1), nothing(count)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the same, for there is nothing to leave out."""
        return like


def nothing(count: int) -> Conditioning:
    """Return the conditioning of points: none."""
    return Conditioning(torch.zeros(count, 1, 0), torch.zeros(count, 0), torch.zeros(count, 6))


class PerfectDenoiser(nn.Module):
    """Answers the mean of x0 given x_t, which for a mixture of Gaussians is known."""

    def __init__(self, schedule: VariancePreserving) -> None:
        """Remember how much noise there is when."""
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x0 | x_t]: the mean of every spot's posterior, weighted by how likely x_t came
        from there.
        """
        alpha, sigma = (c.view(-1, 1) for c in self.schedule.coefficients(t, x_t))
        variance = alpha**2 * DEVIATION**2 + sigma**2
        x, pull = x_t.flatten(1), alpha * DEVIATION**2 / variance
        likely = (alpha / variance * (x @ SPOTS.T - alpha / 2 * SPOT_NORMS)).softmax(1)
        return (pull * x + (1 - alpha * pull) * (likely @ SPOTS)).view(x_t.shape)


class SmallNetwork(nn.Module):
    """The student: two hidden layers, which the time scales and shifts."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.time = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, 4 * width))
        self.first, self.second, self.last = (
            nn.Linear(2, width),
            nn.Linear(width, width),
            nn.Linear(width, 2),
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return what it takes for v."""
        first_scale, first_shift, scale, shift = self.time(waves(t[:, None].log() / 7, 4)).chunk(
            4, dim=1
        )
        hidden = silu(self.first(x_t.flatten(1)) * (1 + first_scale) + first_shift)
        hidden = silu(self.second(hidden) * (1 + scale) + shift)
        return self.last(hidden).view(x_t.shape)


def waves(x: Tensor, count: int) -> Tensor:
    """Return x beside sines and cosines of it, each of twice the frequency of the one before."""
    angles = [math.pi * 2**k * x for k in range(count)]
    return torch.cat([x, *(torch.sin(a) for a in angles), *(torch.cos(a) for a in angles)], dim=1)


@dataclass(frozen=True, eq=False)
class PointDenoiser:
    """What the trainer asks of a denoiser.

    v is x0 at the top, where one step starts, and keeps errors small near the data, where x0 would
    not.
    """

    network: nn.Module
    schedule: VariancePreserving
    prediction_type: PredictionType = "v"
    lora: None = None

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Predict x0 and eps."""
        alpha, sigma = self.schedule.coefficients(t, x_t)
        return prediction_from_output(self.network(x_t, t), x_t, alpha, sigma, self.prediction_type)

    def with_guidance(
        self, conditioning: Conditioning, unconditional: Conditioning, scale: float
    ) -> Denoise:
        """Close over the conditioning; of points there is nothing to guide to."""
        return lambda x_t, t: self(x_t, t, conditioning)


class PointDiscriminator(nn.Module):
    """An encoder of points and times whose features a head judges, alone or in pairs.

    It has no teacher's encoder to start from. High frequencies let it see how sharp the spots are.
    """

    def __init__(self, teacher: PointDenoiser, *, pairs: bool) -> None:
        """Make encoder and head."""
        super().__init__()
        self.pairs, width = pairs, JUDGE_WIDTH
        self.encoder = _layers(3 * 9, width, width)
        self.head = nn.Sequential(
            _layers((2 if pairs else 1) * width, width, width), nn.Linear(width, 1)
        )

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the encoder makes of x at time t."""
        features: Tensor = self.encoder(
            torch.cat([waves(x.flatten(1) / 2, 4), waves(t[:, None] / 1000, 4)], dim=1)
        )
        return features

    def judge(self, before: Tensor | None, after: Tensor) -> Tensor:
        """Return one logit per point."""
        logits: Tensor = self.head(after if before is None else torch.cat([before, after], dim=1))
        return logits.flatten()


def _layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(
        *(layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU()))
    )


def train(
    stage: Stage,
    objective: Objective,
    share: float,
    student: PointDenoiser,
    teacher: PointDenoiser,
    rate: float,
) -> PointDenoiser:
    """Return a copy of the student, trained for a share of the stage's iterations."""
    settings = {
        **{
            "student_steps": stage.steps,
            "teacher_steps": 128 if stage.steps == TEACHER_STEPS else TEACHER_STEPS,
        },
        **{
            "objective": objective,
            "iterations": max(1, round(share * stage.iterations)),
            "batch_size": BATCH_SIZE,
        },
        **{
            "learning_rate": rate,
            "discriminator_learning_rate": 4e-3,
            "early_weight": 5,
            "precision": "fp32",
        },
        **{
            "warmup_iterations": 20,
            "decay_share": 0.8 if objective == "mse" else 0.5,
            "ema_decay": 0.99,
        },
        **{"checkpoint_every": 10_000, "log_every": 10_000},
    }
    phase = Phase.model_validate(settings)
    student = replace(student, network=copy.deepcopy(student.network))
    with tempfile.TemporaryDirectory() as folder:
        train_phase(
            phase,
            Lesson(Spots(), teacher, student, PointDiscriminator),
            RunFolder(Path(folder) / "run", phase),
        )
    return student


def distil(
    start: PointDenoiser, teacher: PointDenoiser, stages: Sequence[Stage]
) -> dict[int, PointDenoiser]:
    """Return the students of a chain by their steps."""
    torch.set_num_threads(1)
    student, students = start, {}
    for stage in stages:
        student = train(stage, "mse", 1 - stage.share, student, teacher, 3e-3)
        if stage.share > 0:
            student = train(stage, stage.objective, stage.share, student, teacher, stage.rate)
        students[stage.steps] = student
    return students


@dataclass(frozen=True, eq=False)
class Drawing:
    """Points that were sampled, the ways they came, and how many hit the spots."""

    label: str
    paths: Tensor

    @classmethod
    @torch.no_grad()
    def by(cls, denoiser: PointDenoiser, steps: int, label: str) -> Drawing:
        """Sample the same noise as every other drawing does."""
        noise = torch.randn(NUM_POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        way: list[Tensor] = []

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            way.append(x_t)
            return denoiser(x_t, t, nothing(len(x_t)))

        way.append(sample(denoise, noise, steps, denoiser.schedule))
        return cls(label, torch.stack(way).flatten(2))

    @property
    def hits(self) -> Tensor:
        """Whether each point lies within three deviations of a spot."""
        return torch.cdist(self.paths[-1], SPOTS).amin(1) < 3 * DEVIATION

    @property
    def figures(self) -> tuple[float, int]:
        """The percentage of points on a spot, and how many spots have a tenth of their share of
        points or more.
        """
        nearest = torch.cdist(self.paths[-1], SPOTS).argmin(1)[self.hits]
        reached = torch.bincount(nearest, minlength=len(SPOTS)) >= 0.1 * NUM_POINTS / len(SPOTS)
        return 100 * self.hits.float().mean().item(), int(reached.sum())


PANEL, GAP, TOP, LEFT, BELOW, FINE = 300, 18, 84, 150, 30, 2
REACH = 2.4
PAPER, GROUND, INK, FAINT = (255, 255, 255), (247, 247, 244), (45, 50, 56), (120, 126, 133)
SPOT, WAY, ON, OFF = (226, 231, 232), (196, 207, 214), (36, 102, 143), (214, 122, 66)


def picture(title: str, rows: dict[str, list[Drawing]]) -> Image.Image:
    """Lay drawings out: a row for each chain, a column for each number of steps."""
    columns = len(next(iter(rows.values())))
    size = LEFT + columns * (PANEL + GAP), TOP + len(rows) * (PANEL + BELOW + GAP) + GAP
    sheet = Image.new("RGB", (FINE * size[0], FINE * size[1]), PAPER)
    draw = ImageDraw.Draw(sheet)
    big, small = (ImageFont.load_default(size=FINE * pixels) for pixels in (20, 15))
    draw.text((FINE * GAP, FINE * 16), title, INK, big)
    legend = (
        "blue: within three deviations of a spot; orange: outside; lines: the ways of a few points"
    )
    draw.text((FINE * (size[0] - GAP), FINE * 20), legend, FAINT, small, anchor="ra")
    for row, (name, drawings) in enumerate(rows.items()):
        y = FINE * (TOP + row * (PANEL + BELOW + GAP))
        draw.multiline_text(
            (FINE * GAP, y + FINE * (PANEL // 2 - 24)), name, INK, small, spacing=FINE * 6
        )
        for column, drawing in enumerate(drawings):
            x = FINE * (LEFT + column * (PANEL + GAP))
            middle = x + FINE * PANEL // 2
            if row == 0:
                draw.text((middle, y - FINE * 8), drawing.label, INK, small, anchor="mb")
            sheet.paste(panel(drawing), (x, y))
            share, reached = drawing.figures
            told = f"{share:.0f} % on a spot, {reached} spots"
            draw.text((middle, y + FINE * (PANEL + 8)), told, FAINT, small, anchor="mt")
    return sheet.resize(size, Image.Resampling.LANCZOS)


def panel(drawing: Drawing) -> Image.Image:
    """Draw spots, the ways of a few points, and where many landed."""
    side = FINE * PANEL
    image = Image.new("RGB", (side, side), GROUND)
    draw = ImageDraw.Draw(image)

    def dot(place: Sequence[float], radius: float, colour: tuple[int, int, int]) -> None:
        x, y = place
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    for place in _pixels(SPOTS, side).tolist():
        dot(place, 3 * DEVIATION / (2 * REACH) * side, SPOT)
    for way in _pixels(drawing.paths[:, :90], side).transpose(0, 1).tolist():
        draw.line([tuple(place) for place in way], WAY, FINE)
    hits = drawing.hits.tolist()
    for place, hit in zip(_pixels(drawing.paths[-1, :1600], side).tolist(), hits, strict=False):
        dot(place, 1.2 * FINE, ON if hit else OFF)
    return image


def _pixels(points: Tensor, side: int) -> Tensor:
    return (points / (2 * REACH) + 0.5) * side


def main(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("toy2d.png"),
    effort: Annotated[float, typer.Option(help="Factor on all iterations, to try it out.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the weights that the student starts with.")] = 1,
) -> None:
    """Train both chains, print what share of their points lies on a spot, and draw them."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    schedule = VariancePreserving.linear()
    teacher = PointDenoiser(PerfectDenoiser(schedule), schedule, "x0")
    stages = [
        replace(stage, iterations=max(2, round(effort * stage.iterations))) for stage in STAGES
    ]
    first = Stage(TEACHER_STEPS, max(2, round(effort * FIRST_ITERATIONS)), "mse", 0, 0)
    start = train(
        first, "mse", 1, PointDenoiser(SmallNetwork(STUDENT_WIDTH), schedule), teacher, 5e-3
    )
    plans = {
        "MSE alone": [replace(stage, share=0) for stage in stages],
        "MSE, then\ndiscriminator": stages,
    }
    with ProcessPoolExecutor(len(plans), get_context("spawn")) as processes:
        running = {
            name: processes.submit(distil, start, teacher, plan) for name, plan in plans.items()
        }
        chains = {name: chain.result() for name, chain in running.items()}
    taught = Drawing.by(teacher, TEACHER_STEPS, f"teacher, {TEACHER_STEPS} steps")
    rows = {}
    typer.echo(
        "| points on a spot, spots reached | MSE alone | MSE, then discriminator |\n|---|---:|---:|"
    )
    for name, students in chains.items():
        shown = [
            Drawing.by(student, steps, f"{steps} step{'s' * (steps > 1)}")
            for steps, student in students.items()
        ]
        rows[name] = [taught, *shown]
    for drawings in zip(*rows.values(), strict=True):
        cells = " | ".join("{:.1f} %, {}".format(*drawing.figures) for drawing in drawings)
        typer.echo(f"| {drawings[0].label} | {cells} |")
    picture("Down to one step with a network too small for it", rows).save(out)
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
