"""Progressive adversarial distillation in two dimensions, in under a minute: the trainer and objectives of the package.

    python examples/toy2d.py [--out toy2d.png]

A small network learns the flow of eight spots on a ring. It is then distilled 32 -> 8 -> 4 -> 2 -> 1, once by the
discriminator and once by MSE alone, and everything is drawn: the flows of the same 24 points, and samples. Asked for
fewer steps than the flow needs, MSE answers with the average of where it could have gone, between the spots; the
discriminator sends every sample to a spot. A point is a latent of shape (2, 1, 1), so nothing is written anew for it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from twostep.diffusion import NoiseSchedule, solve, trailing_times
from twostep.distill.recipe import Phase
from twostep.distill.trainer import Lesson, train_phase
from twostep.models.conditioning import Conditioning
from twostep.models.denoiser import Denoiser
from twostep.runs.folder import RunFolder

SPOTS, RADIUS, SPREAD = 8, 1.4, 0.06
WIDTH = 128
PANEL, REACH = 220, 2.6
STEPS = (32, 8, 4, 2, 1)


class PointNetwork(nn.Module):
    """An MLP in the place of the UNet: (x_t, t) -> its prediction; it has no words to listen to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(100), 16)))
        self.first = nn.Linear(2 + 32, WIDTH)
        self.hidden = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.last = nn.Linear(WIDTH, 2)

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        phase = (t.float() / 1000)[:, None] * self.frequencies
        return self.hidden(self.first(torch.cat([x.flatten(1), phase.sin(), phase.cos()], dim=1)))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, **_: object) -> tuple[Tensor]:
        return (self.last(self.features(x, t))[:, :, None, None],)


class PointDiscriminator(nn.Module):
    """The teacher's layers without the last, and a head, as the discriminator of pictures is."""

    def __init__(self, teacher: Denoiser, *, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.encoder = copy.deepcopy(teacher.network).requires_grad_(True)
        self.head = nn.Sequential(nn.Linear((1 + pairs) * WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def features(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.encoder.features(x, t - 1)

    def judge(self, before: Tensor | None, after: Tensor) -> Tensor:
        return self.head(after if before is None else torch.cat([before, after], dim=1))[:, 0]


class Ring:
    """Where training points come from: eight spots on a ring, without words."""

    def draw(self, count: int, tensors: torch.Generator, words: random.Random) -> tuple[Tensor, Conditioning]:
        angle = torch.randint(SPOTS, (count,), generator=tensors) * (2 * math.pi / SPOTS)
        centres = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
        return (centres + SPREAD * torch.randn(count, 2, generator=tensors))[:, :, None, None], no_words(count)

    def empty(self, like: Conditioning) -> Conditioning:
        return like


def no_words(count: int) -> Conditioning:
    """Return a conditioning that says nothing."""
    return Conditioning(torch.zeros(count, 1, 1), torch.zeros(count, 1), torch.zeros(count, 6))


def train_teacher(iterations: int) -> Denoiser:
    """Train the network to predict the noise."""
    torch.manual_seed(0)
    denoiser = Denoiser(PointNetwork(), NoiseSchedule.scaled_linear())
    optimiser = torch.optim.AdamW(denoiser.network.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    generator, ring = torch.Generator().manual_seed(0), Ring()
    for _ in range(iterations):
        x0, conditioning = ring.draw(512, generator, random.Random(0))
        t = torch.randint(1, 1001, (len(x0),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        loss = (denoiser(denoiser.schedule.add_noise(x0, eps, t), t, conditioning).eps - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    denoiser.network.requires_grad_(False)
    return denoiser


def phases(adversarial: bool) -> list[Phase]:
    """Return the chain 32 -> 8 -> 4 -> 2 -> 1, by the discriminator or by MSE alone, equally long."""
    shared = {"iterations": 400, "batch_size": 256, "precision": "fp32", "warmup_iterations": 10, "ema_decay": 0.99}
    chain = []
    for student, teacher, skip in ((8, 32, 32), (4, 8, 8), (2, 4, 8), (1, 2, 4)):
        steps = {"student_steps": student, "teacher_steps": teacher}
        if student == 1:
            chain.append({**steps, "objective": "convert", "learning_rate": 1e-3})
        if adversarial:
            chain.append({**steps, "objective": "conditional", "learning_rate": 3e-4})
            chain.append({**steps, "teacher_steps": skip, "objective": "unconditional", "learning_rate": 3e-4})
        else:
            chain.append({**steps, "objective": "mse", "learning_rate": 1e-3, "iterations": 800})
    return [Phase.model_validate({**shared, **phase}) for phase in chain]


def distil(teacher: Denoiser, chain: list[Phase], runs: Path) -> dict[int, Denoiser]:
    """Run the phases and return the students by their steps."""
    finished, student = {32: teacher}, teacher
    for phase in chain:
        network = copy.deepcopy(student.network).requires_grad_(True)
        learner = replace(student, network=network, prediction_type=phase.predicts(student.prediction_type))
        taught_by = student if phase.objective == "convert" else finished[phase.teacher_steps]
        lesson = Lesson(Ring(), taught_by, learner, PointDiscriminator)
        train_phase(phase, lesson, RunFolder(runs / phase.name, phase))
        learner.network.requires_grad_(False)
        student = finished[phase.student_steps] = learner
    return finished


def flow(denoiser: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """Return the path of every point from noise to picture, (steps + 1, points, 2)."""
    path = [noise.flatten(1)]
    times = torch.tensor([*trailing_times(steps), 0])[:, None].expand(-1, len(noise))
    with torch.no_grad():
        given = denoiser.given(no_words(len(noise)))
        for here, there in itertools.pairwise(times):
            noise = solve(given, noise, torch.stack([here, there]), denoiser.schedule)
            path.append(noise.flatten(1))
    return torch.stack(path)


def off_the_spots(points: Tensor) -> float:
    """Return the share of points that lie more than four deviations from every spot."""
    angle = torch.arange(SPOTS) * (2 * math.pi / SPOTS)
    centres = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return (torch.cdist(points, centres).min(dim=1).values > 4 * SPREAD).float().mean().item()


def panel(denoiser: Denoiser, steps: int, title: str) -> Image.Image:
    """Draw 1,500 samples and the flow of 24 points."""
    image = Image.new("RGB", (PANEL, PANEL + 16), "white")
    pen = ImageDraw.Draw(image)
    noise = torch.randn(1500, 2, 1, 1, generator=torch.Generator().manual_seed(1))
    path = flow(denoiser, noise, steps)

    def place(point: Tensor) -> tuple[float, float]:
        x, y = point.tolist()
        return (x / REACH + 1) * PANEL / 2, (1 - y / REACH) * PANEL / 2 + 16

    for i in range(24):
        pen.line([place(point) for point in path[:, i]], fill=(170, 190, 225))
    for point in path[-1]:
        x, y = place(point)
        pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(200, 60, 40))
    pen.text((4, 2), f"{title}, {steps}: {100 * off_the_spots(path[-1]):.0f} % off", fill="black")
    return image


def main() -> None:
    """Train, distil twice, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("toy2d.png"))
    parser.add_argument("--iterations", type=int, default=3000, help="of the teacher")
    options = parser.parse_args()
    began = time.monotonic()
    teacher = train_teacher(options.iterations)
    print(f"teacher: {time.monotonic() - began:.0f} s")
    with tempfile.TemporaryDirectory() as runs:
        rows = [("adversarial", distil(teacher, phases(True), Path(runs) / "adversarial"))]
        rows.append(("MSE alone", distil(teacher, phases(False), Path(runs) / "mse")))
    sheet = Image.new("RGB", (PANEL * len(STEPS), (PANEL + 16) * len(rows)), "white")
    for row, (title, students) in enumerate(rows):
        for column, steps in enumerate(STEPS):
            sheet.paste(panel(students[steps], steps, title), (column * PANEL, row * (PANEL + 16)))
    sheet.save(options.out)
    print(f"{options.out}: {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
