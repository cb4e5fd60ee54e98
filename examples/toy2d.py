"""Distillation on points in the plane, down to one step, in about two minutes on two cores.

    python examples/toy2d.py [--out toy2d.png]

The data are 25 sharp spots, so the teacher needs no training: what a perfect denoiser answers is a
softmax over the spots, and it teaches every stage itself, in 32 steps. The student is one small
network, too small for the steep map from noise to spots that one step asks for, and this is where
the mean squared error averages: it leaves points between the spots, however long it goes on. At one
step two students start from the same one of two steps and get the same number of examples:
regression alone, or regression and then a discriminator, for which the data's points are real. The
second puts more points on spots, and gives up some of the spots for it (docs/log.md has two
seeds). With a wider student regression alone is better.

Trainer, methods and sampler are the package's. Written here is what other data need: a source,
two backbones, and a method of our own, which is the adversarial one with another discriminator.
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
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import silu

from twostep.diffusion import Prediction, VariancePreserving, sample
from twostep.distill.methods.adversarial import Adversarial
from twostep.distill.methods.registry import register_method
from twostep.distill.recipe import Stage
from twostep.distill.trainer import train_stage
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.training.run_folder import RunFolder

DEVIATION = 0.05
SPOTS = 0.75 * torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0))
SPOT_NORMS = SPOTS.square().sum(1)
TEACHER_STEPS = 32
STUDENT_WIDTH, JUDGE_WIDTH = 14, 128
BATCH_SIZE = 256
NUM_POINTS = 4096


@dataclass(frozen=True)
class Student:
    """One student of the chain.

    Args:
        steps: that it draws in.
        iterations: in which it is trained.
        adversarial_share: share of them against a discriminator, after regression.
        learning_rate: of the student against the discriminator.
    """

    steps: int
    iterations: int
    adversarial_share: float
    learning_rate: float = 3e-4


REGRESSION = {"name": "regression"}
ADVERSARY = {"real": "data", "r1_weight": 2.0, "r2_weight": 2.0, "perturbation": 0.02}
"""Points of the data are what counts as real: they cost no teacher."""

FIRST = Student(TEACHER_STEPS, 1500, 0.0)
STUDENTS = (
    Student(8, 300, 0.0),
    Student(4, 200, 0.0),
    Student(2, 300, 0.0),
    Student(1, 3000, 0.5),
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


POINTS = BackboneSpec(family="points", in_channels=2, out_channels=2)


class PerfectBackbone(nn.Module):
    """Answers the mean of x0 given x_t, which for a mixture of Gaussians is known."""

    spec = POINTS

    def __init__(self, schedule: VariancePreserving) -> None:
        """Remember how much noise there is at which time."""
        super().__init__()
        self.schedule = schedule
        # Nothing is learned, but a parameter tells where a network is.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return E[x0 | x_t].

        That is the mean of every spot's posterior, weighted by how likely x_t came from the spot.
        """
        alpha, sigma = (c.view(-1, 1) for c in self.schedule.coefficients(time + 1, x_t))
        variance = alpha**2 * DEVIATION**2 + sigma**2
        x = x_t.flatten(1)
        pull = alpha * DEVIATION**2 / variance
        likely = (alpha / variance * (x @ SPOTS.T - alpha / 2 * SPOT_NORMS)).softmax(1)
        return (pull * x + (1 - alpha * pull) * (likely @ SPOTS)).view(x_t.shape)


class SmallBackbone(nn.Module):
    """The student: two hidden layers, which the time scales and shifts."""

    spec = POINTS

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.time = nn.Sequential(nn.Linear(9, width), nn.SiLU(), nn.Linear(width, 4 * width))
        self.first = nn.Linear(2, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what it takes for v."""
        log_time = (time[:, None] + 1).log() / 7
        first_scale, first_shift, scale, shift = self.time(waves(log_time, 4)).chunk(4, dim=1)
        hidden = silu(self.first(x_t.flatten(1)) * (1 + first_scale) + first_shift)
        hidden = silu(self.second(hidden) * (1 + scale) + shift)
        return self.last(hidden).view(x_t.shape)


def waves(x: Tensor, count: int) -> Tensor:
    """Return x beside sines and cosines of it, each of twice the frequency of the one before."""
    angles = [math.pi * 2**k * x for k in range(count)]
    return torch.cat([x, *(torch.sin(a) for a in angles), *(torch.cos(a) for a in angles)], dim=1)


class PointDiscriminator(nn.Module):
    """An encoder of points and times whose features a head judges, alone or in pairs.

    It has no teacher's encoder to start from. High frequencies let it see how sharp the spots are.
    """

    def __init__(self, *, conditional: bool) -> None:
        """Make encoder and head."""
        super().__init__()
        self.conditional = conditional
        width = JUDGE_WIDTH
        self.encoder = _layers(3 * 9, width, width)
        in_width = 2 * width if conditional else width
        self.head = nn.Sequential(_layers(in_width, width, width), nn.Linear(width, 1))

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Sequence[Tensor]:
        """Return what the encoder makes of x at time t: one level."""
        places = waves(x.flatten(1) / 2, 4)
        times = waves(t[:, None] / 1000, 4)
        return [self.encoder(torch.cat([places, times], dim=1))]

    def judge(self, before: Sequence[Tensor] | None, after: Sequence[Tensor]) -> Tensor:
        """Return one logit per point."""
        levels = after if before is None else [*before, *after]
        logits: Tensor = self.head(torch.cat(list(levels), dim=1))
        return logits.flatten()


@register_method
class AdversarialPoints(Adversarial):
    """The adversarial method, with a discriminator for points."""

    name = "adversarial-points"

    def make_discriminator(self, teacher: Denoiser) -> PointDiscriminator:
        """Return a fresh one, for a perfect teacher has no encoder to start from."""
        return PointDiscriminator(conditional=self.settings.objective == "conditional")


def _layers(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_width, out_width in pairwise(widths):
        layers += [nn.Linear(in_width, out_width), nn.SiLU()]
    return nn.Sequential(*layers)


def train(
    student: Denoiser,
    teacher: Denoiser,
    steps: int,
    iterations: float,
    method: dict[str, Any],
    learning_rate: float,
) -> Denoiser:
    """Return a copy of the student, trained in one stage.

    Args:
        student: stays as it is.
        teacher: teaches in 32 steps; the 32-step student itself learns from 128.
        steps: of the student.
        iterations: rounded, at least one.
        method: its table, as in a recipe.
        learning_rate: of the student.
    """
    stage = Stage(
        student_steps=steps,
        teacher_steps=128 if steps == TEACHER_STEPS else TEACHER_STEPS,
        method=method,
        iterations=max(1, round(iterations)),
        batch_size=BATCH_SIZE,
        learning_rate=learning_rate,
        precision="fp32",
        warmup_iterations=20,
        decay_share=0.8 if method is REGRESSION else 0.5,
        ema_decay=0.99,
        checkpoint_every=10_000,
        log_every=10_000,
    )
    student = student.with_network(copy.deepcopy(student.network))
    with tempfile.TemporaryDirectory() as folder:
        train_stage(stage, Spots(), teacher, student, RunFolder(Path(folder) / "run", stage))
    return student


def distil(start: Denoiser, teacher: Denoiser, chain: Sequence[Student]) -> dict[int, Denoiser]:
    """Return the students of a chain by their steps."""
    torch.set_num_threads(1)
    denoiser = start
    denoisers = {}
    for student in chain:
        share = student.adversarial_share
        iterations = (1 - share) * student.iterations
        denoiser = train(denoiser, teacher, student.steps, iterations, REGRESSION, 3e-3)
        if share > 0:
            adversarial = {
                "name": AdversarialPoints.name,
                "discriminator_learning_rate": 4e-3,
                "noised_weights": (5, 1, 1, 1),
                **ADVERSARY,
            }
            iterations = share * student.iterations
            denoiser = train(
                denoiser, teacher, student.steps, iterations, adversarial, student.learning_rate
            )
        denoisers[student.steps] = denoiser
    return denoisers


@dataclass(frozen=True, eq=False)
class Drawing:
    """Points that were sampled.

    Args:
        label: of the column.
        paths: places on the way from noise to points, [steps + 1, points, 2].
    """

    label: str
    paths: Tensor

    @classmethod
    @torch.no_grad()
    def by(cls, denoiser: Denoiser, steps: int, label: str) -> Drawing:
        """Sample from the same noise as every other drawing."""
        noise = torch.randn(NUM_POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(1))
        places: list[Tensor] = []

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            places.append(x_t)
            return denoiser(x_t, t, nothing(len(x_t)))

        places.append(sample(denoise, noise, steps, denoiser.schedule))
        return cls(label, torch.stack(places).flatten(2))

    @property
    def hits(self) -> Tensor:
        """Whether each point lies within three deviations of a spot."""
        return torch.cdist(self.paths[-1], SPOTS).amin(1) < 3 * DEVIATION

    @property
    def figures(self) -> tuple[float, int]:
        """The percentage of points on a spot, and the number of spots that are reached.

        A spot is reached if it has at least a tenth of its share of the points.
        """
        nearest = torch.cdist(self.paths[-1], SPOTS).argmin(1)[self.hits]
        reached = torch.bincount(nearest, minlength=len(SPOTS)) >= 0.1 * NUM_POINTS / len(SPOTS)
        return 100 * self.hits.float().mean().item(), int(reached.sum())


PANEL = 300
GAP = 18
TOP = 84
LEFT = 150
BELOW = 30
FINE = 2
"""Sizes of the picture in pixels; it is drawn FINE times as large and scaled down."""

REACH = 2.4
"""The panels show -REACH to REACH in both directions."""

PAPER = (255, 255, 255)
GROUND = (247, 247, 244)
INK = (45, 50, 56)
FAINT = (120, 126, 133)
SPOT = (226, 231, 232)
PATH = (196, 207, 214)
ON = (36, 102, 143)
OFF = (214, 122, 66)

LEGEND = (
    "blue: within three deviations of a spot; orange: outside; lines: the paths of a few points"
)


def picture(title: str, rows: dict[str, list[Drawing]]) -> Image.Image:
    """Lay drawings out: a row for each chain, a column for each number of steps."""
    num_columns = len(next(iter(rows.values())))
    width = LEFT + num_columns * (PANEL + GAP)
    height = TOP + len(rows) * (PANEL + BELOW + GAP) + GAP
    sheet = Image.new("RGB", (FINE * width, FINE * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    big = ImageFont.load_default(size=FINE * 20)
    small = ImageFont.load_default(size=FINE * 15)
    draw.text((FINE * GAP, FINE * 16), title, INK, big)
    draw.text((FINE * (width - GAP), FINE * 20), LEGEND, FAINT, small, anchor="ra")
    for row, (name, drawings) in enumerate(rows.items()):
        y = FINE * (TOP + row * (PANEL + BELOW + GAP))
        name_y = y + FINE * (PANEL // 2 - 24)
        draw.multiline_text((FINE * GAP, name_y), name, INK, small, spacing=FINE * 6)
        for column, drawing in enumerate(drawings):
            x = FINE * (LEFT + column * (PANEL + GAP))
            middle = x + FINE * PANEL // 2
            if row == 0:
                draw.text((middle, y - FINE * 8), drawing.label, INK, small, anchor="mb")
            sheet.paste(panel(drawing), (x, y))
            percentage, num_reached = drawing.figures
            caption = f"{percentage:.0f} % on a spot, {num_reached} spots"
            draw.text((middle, y + FINE * (PANEL + 8)), caption, FAINT, small, anchor="mt")
    return sheet.resize((width, height), Image.Resampling.LANCZOS)


def panel(drawing: Drawing) -> Image.Image:
    """Draw the spots, the paths of a few points, and where many landed."""
    side = FINE * PANEL
    image = Image.new("RGB", (side, side), GROUND)
    draw = ImageDraw.Draw(image)

    def dot(place: Sequence[float], radius: float, colour: tuple[int, int, int]) -> None:
        x, y = place
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    for place in _pixels(SPOTS, side).tolist():
        dot(place, 3 * DEVIATION / (2 * REACH) * side, SPOT)
    for path in _pixels(drawing.paths[:, :90], side).transpose(0, 1).tolist():
        draw.line([tuple(place) for place in path], PATH, FINE)
    hits = drawing.hits.tolist()
    places = _pixels(drawing.paths[-1, :1600], side).tolist()
    for place, hit in zip(places, hits, strict=False):
        dot(place, 1.2 * FINE, ON if hit else OFF)
    return image


def _pixels(points: Tensor, side: int) -> Tensor:
    return (points / (2 * REACH) + 0.5) * side


def shortened(student: Student, effort: float) -> Student:
    """Return a student with fewer iterations, at least two."""
    return replace(student, iterations=max(2, round(effort * student.iterations)))


def main(
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("toy2d.png"),
    effort: Annotated[float, typer.Option(help="Factor on all iterations, to try it out.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the weights that the student starts with.")] = 1,
) -> None:
    """Train both chains, print what share of their points lies on a spot, and draw them."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    schedule = VariancePreserving.linear()
    teacher = Denoiser(PerfectBackbone(schedule), schedule, "x0")
    # v is x0 at the top, where one step starts, and keeps errors small near the data, where x0
    # would not.
    untrained = Denoiser(SmallBackbone(STUDENT_WIDTH), schedule, "v")
    iterations = shortened(FIRST, effort).iterations
    start = train(untrained, teacher, TEACHER_STEPS, iterations, REGRESSION, 5e-3)
    students = [shortened(student, effort) for student in STUDENTS]
    plans = {
        "MSE alone": [replace(student, adversarial_share=0.0) for student in students],
        "MSE, then\ndiscriminator": students,
    }
    chains = run_chains(start, teacher, plans)
    from_teacher = Drawing.by(teacher, TEACHER_STEPS, f"teacher, {TEACHER_STEPS} steps")
    rows = {}
    for name, denoisers in chains.items():
        rows[name] = [from_teacher]
        for steps, denoiser in denoisers.items():
            label = f"{steps} step{'s' if steps > 1 else ''}"
            rows[name].append(Drawing.by(denoiser, steps, label))
    typer.echo("| points on a spot, spots reached | MSE alone | MSE, then discriminator |")
    typer.echo("|---|---:|---:|")
    for drawings in zip(*rows.values(), strict=True):
        cells = " | ".join("{:.1f} %, {}".format(*drawing.figures) for drawing in drawings)
        typer.echo(f"| {drawings[0].label} | {cells} |")
    picture("Down to one step with a network too small for it", rows).save(out)
    typer.echo(f"written: {out}")


def run_chains(
    start: Denoiser, teacher: Denoiser, plans: dict[str, Sequence[Student]]
) -> dict[str, dict[int, Denoiser]]:
    """Train chains at the same time, one process each."""
    with ProcessPoolExecutor(len(plans), get_context("spawn")) as processes:
        running = {
            name: processes.submit(distil, start, teacher, plan) for name, plan in plans.items()
        }
        return {name: chain.result() for name, chain in running.items()}


if __name__ == "__main__":
    typer.run(main)
