"""Pairs of transitions: from the same x_t, where the teacher lands in n steps and where the student
lands in one.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from twostep.diffusion import Denoise, VariancePreserving, landing, solve, trained_times
from twostep.diffusion.shapes import Latents, Times
from twostep.networks.conditioning import Conditioning

NOISED_TIMES = (10, 250, 500, 750)
"""t*: times to which clean landings are noised before they are judged (section 3.7.2)."""


@dataclass(frozen=True, eq=False)
class Transition:
    """One step as a fact that can be judged: from x_t at t to x_s at s < t."""

    x_t: Latents
    x_s: Latents
    t: Times
    s: Times
    conditioning: Conditioning


def draw_times(student_steps: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Draw one trained time per item."""
    times = torch.tensor(trained_times(student_steps))
    return times[torch.randint(len(times), (count,), generator=generator)]


def teacher_landing(
    teach: Denoise,
    x_t: Latents,
    t: Times,
    student_steps: int,
    teacher_steps: int,
    schedule: VariancePreserving,
) -> Latents:
    """Let the teacher walk n = teacher_steps / student_steps steps of its own grid, never below the
    student's s.
    """
    times = [t]
    for _ in range(teacher_steps // student_steps):
        times.append(landing(times[-1], teacher_steps))
    with torch.no_grad():
        return solve(teach, x_t, torch.stack(times), schedule)


def draw_noised_times(
    count: int, early_weight: int, generator: torch.Generator
) -> Int[Tensor, " count"]:
    """Draw one t* per item; `early_weight` is the weight of t* = 10 against 1 for the others."""
    weights = torch.tensor([early_weight, 1, 1, 1], dtype=torch.float32)
    return torch.tensor(NOISED_TIMES)[
        torch.multinomial(weights, count, replacement=True, generator=generator)
    ]


def noise_landed(
    x_s: Latents, s: Times, noised: Times, eps: Latents, schedule: VariancePreserving
) -> Latents:
    """Noise what landed on 0 to its t*; the rest stays as it is."""
    landed = (s == 0).to(x_s.device).view(-1, 1, 1, 1)
    return torch.where(landed, schedule.add_noise(x_s, eps, noised), x_s)
