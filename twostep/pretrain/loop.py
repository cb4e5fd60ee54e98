"""The training loop of this room: AdamW, warm-up and cosine decay, EMA, checkpoints; the same command resumes.

Every iteration seeds its own generator from (seed, iteration), so a resumed run draws what the uninterrupted one would.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from twostep.errors import TwostepError
from twostep.runs.folder import RunFolder
from twostep.runs.recipe import Settings


class TrainingError(TwostepError):
    """Training cannot go on: the loss is no number any more."""


class LoopSettings(Settings):
    """How a network is trained, whatever it learns."""

    iterations: int = Field(gt=0, description="number of optimiser steps")
    batch_size: int = Field(gt=0, description="examples per step")
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    warmup_iterations: int = Field(100, ge=0, description="linear warm-up; then a cosine to a fiftieth of the peak")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay per step of the averaged weights that are kept")
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")
    precision: str = Field("bf16", pattern="^(fp32|bf16)$", description="autocast precision of forward passes")
    checkpoint_every: int = Field(500, gt=0, description="iterations between checkpoints")
    log_every: int = Field(50, gt=0, description="iterations between lines of the log")
    seed: int = Field(0, ge=0, description="seed of everything random")


@dataclass(frozen=True)
class Draw:
    """The randomness of one iteration: for tensors, and for words."""

    tensors: torch.Generator
    words: random.Random

    @classmethod
    def at(cls, seed: int, iteration: int) -> "Draw":
        """Return the randomness that belongs to this iteration of a run, whatever happened before it."""
        number = (seed << 32) + iteration
        return cls(torch.Generator().manual_seed(number), random.Random(number))


Loss = Callable[[int, Draw], Tensor]
OnIteration = Callable[[int, float], None]


def train(
    network: nn.Module,
    loss: Loss,
    settings: LoopSettings,
    *,
    folder: RunFolder,
    name: str,
    on_iteration: OnIteration = lambda iteration, loss: None,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train `network` in place on `loss(iteration, draw)` and leave its averaged weights in it.

    Checkpoints go to `folder` under `name`; a finished or interrupted run goes on from there.
    `on_checkpoint` sees the network with its averaged weights. Raises TrainingError on a loss that is not finite.
    """
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    start = _resume(folder.load(name), network, optimiser, average)
    began, recent = time.monotonic(), 0.0
    for iteration in range(start, settings.iterations):
        value = _iterate(network, loss, optimiser, settings, iteration)
        recent += value
        _update_average(average, network, min(settings.ema_decay, (iteration + 1) / (iteration + 10)))
        done = iteration + 1
        on_iteration(done, value)
        if done % settings.log_every == 0:
            seconds = (time.monotonic() - began) / (done - start)
            mean = recent / min(settings.log_every, done - start)
            folder.log(part=name, iteration=done, loss=mean, seconds_per_iteration=round(seconds, 4))
            recent = 0.0
        if done % settings.checkpoint_every == 0 or done == settings.iterations:
            state = {"iteration": done, "network": network.state_dict(), "average": average}
            folder.save(name, {**state, "optimiser": optimiser.state_dict()})
            with _weights(network, average):
                on_checkpoint(done)
    network.load_state_dict(average)


def _iterate(
    network: nn.Module, loss: Loss, optimiser: torch.optim.Optimizer, settings: LoopSettings, iteration: int
) -> float:
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * _decay(iteration, settings)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        value = loss(iteration, Draw.at(settings.seed, iteration))
    if not torch.isfinite(value):
        raise TrainingError(
            f"The loss is {value.item()} at iteration {iteration}. The last checkpoint is whole: lower learning_rate "
            f"(now {settings.learning_rate}) or set precision to fp32, and run the command again."
        )
    value.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return value.item()


def _decay(iteration: int, settings: LoopSettings) -> float:
    if iteration < settings.warmup_iterations:
        return (iteration + 1) / settings.warmup_iterations
    progress = (iteration - settings.warmup_iterations) / max(1, settings.iterations - settings.warmup_iterations)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return 0.02 + 0.98 * cosine


def _resume(
    state: dict[str, Any] | None, network: nn.Module, optimiser: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    if state is None:
        return 0
    network.load_state_dict(state["network"])
    optimiser.load_state_dict(state["optimiser"])
    for key, value in state["average"].items():
        average[key].copy_(value)
    return int(state["iteration"])


def _update_average(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    current = network.state_dict()
    floats = [key for key in average if average[key].is_floating_point()]
    torch._foreach_lerp_([average[key] for key in floats], [current[key] for key in floats], 1 - decay)


class _weights:
    """Within it the network has other weights; after it, its own again."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        self.network, self.weights = network, weights

    def __enter__(self) -> None:
        self.own = {key: value.clone() for key, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.weights)

    def __exit__(self, *_: object) -> None:
        self.network.load_state_dict(self.own)
