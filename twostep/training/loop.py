"""The loop under every training: iterate, log, checkpoint, resume. What an iteration does is its
caller's matter.

Every iteration seeds its own randomness from (seed, iteration), so a resumed run draws what the
uninterrupted one would.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostep.errors import TwostepError
from twostep.training.processes import average, averaged
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder


class TrainingError(TwostepError):
    """Training cannot go on: a loss is no number any more."""


class LoopSettings(Settings):
    """How often, from which seed, and how often something is kept."""

    iterations: int = Field(gt=0, description="number of iterations")
    batch_size: int = Field(gt=0, description="examples per iteration")
    learning_rate: float = Field(gt=0, description="peak learning rate of every optimiser")
    warmup_iterations: int = Field(100, ge=0, description="iterations of linear warm-up")
    decay_share: float = Field(
        0.0, ge=0, le=1, description="share of the iterations over which the rate decays"
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay per step of the averaged weights that are kept"
    )
    precision: str = Field(
        "bf16", pattern="^(fp32|bf16)$", description="autocast precision of forward passes"
    )
    checkpoint_every: int = Field(500, gt=0, description="iterations between checkpoints")
    log_every: int = Field(50, gt=0, description="iterations between lines of the log")
    seed: int = Field(0, ge=0, lt=2**20, description="seed of everything random")

    @contextmanager
    def autocast(self, device: str = "cpu") -> Iterator[None]:
        """Set the precision of forward passes, and their attention."""
        with (
            torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"),
            training_attention(device),
        ):
            yield


def training_attention(device: str) -> AbstractContextManager[None]:
    """Choose the attention whose gradient is a quarter faster on the CPU; elsewhere torch chooses.

    Backward passes need it as well, for blocks that are computed anew must be computed as they
    were.
    """
    attention: AbstractContextManager[None] = (
        sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
    )
    return attention


@dataclass(frozen=True)
class Randomness:
    """The randomness of one iteration: for tensors, and for words."""

    tensors: torch.Generator
    words: random.Random

    @classmethod
    def at(cls, seed: int, iteration: int) -> Randomness:
        """Return the randomness that belongs to this iteration of a run, whatever happened before
        it.
        """
        # Mixed, because torch's generator reads only 32 bits of a seed.
        number = random.Random(f"{seed}/{iteration}").getrandbits(31)
        return cls(torch.Generator().manual_seed(number), random.Random(number))


class MovingAverage:
    """An exponential moving average of weights in training, a network's or a LoRA's; it follows
    quickly at first.
    """

    def __init__(self, trained: Stateful, decay: float) -> None:
        """Start from the weights as they are."""
        self.trained, self.decay, self.num_updates = trained, decay, 0
        self.weights = {key: value.detach().clone() for key, value in trained.state_dict().items()}

    def update(self) -> None:
        """Take in the present weights."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        current = self.trained.state_dict()
        floats = [key for key, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[key] for key in floats], [current[key] for key in floats], 1 - decay
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"weights": self.weights, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.num_updates = state_dict["num_updates"]
        for key, value in state_dict["weights"].items():
            self.weights[key].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it what is trained has the averaged weights; after it, its own again."""
        own = {key: value.clone() for key, value in self.trained.state_dict().items()}
        self.trained.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.trained.load_state_dict(own)


def rate_share(iteration: int, settings: LoopSettings) -> float:
    """Return the share of the peak learning rate: linear warm-up, constant, and a cosine down to a
    fiftieth.
    """
    if iteration < settings.warmup_iterations:
        return (iteration + 1) / settings.warmup_iterations
    num_decaying = settings.decay_share * settings.iterations
    if num_decaying == 0:
        return 1.0
    progress = max(0.0, 1 - (settings.iterations - iteration) / num_decaying)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


OnIteration = Callable[[int, dict[str, float]], None]


def repeat(
    iterate: Callable[[int, Randomness], dict[str, float]],
    settings: LoopSettings,
    folder: RunFolder,
    name: str,
    state: Mapping[str, Stateful],
    *,
    keep_start: bool = False,
    on_iteration: OnIteration = lambda iteration, figures: None,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Call `iterate(iteration, draw) -> figures` until the recipe's iterations are done.

    `state` is kept in the checkpoint `name` and brought back when the same run starts again;
    `on_checkpoint` comes before that, so what it refuses by raising is not kept. `keep_start` also
    keeps the state before the first iteration.
    """

    def keep(done: int) -> None:
        folder.save(
            name, {"iteration": done, **{key: holder.state_dict() for key, holder in state.items()}}
        )

    start = _bring_back(folder, name, state)
    if start is None and keep_start:
        keep(0)
    start = start or 0
    began, sums, counted = time.monotonic(), dict[str, float](), 0
    for iteration in range(start, settings.iterations):
        figures = averaged(iterate(iteration, Randomness.at(settings.seed, iteration)))
        done, counted = iteration + 1, counted + 1
        sums = {key: sums.get(key, 0.0) + value for key, value in figures.items()}
        on_iteration(done, figures)
        if done % settings.log_every == 0:
            means = {key: value / counted for key, value in sums.items()}
            seconds = round((time.monotonic() - began) / (done - start), 4)
            folder.log(part=name, iteration=done, **means, seconds_per_iteration=seconds)
            sums, counted = {}, 0
        if done % settings.checkpoint_every == 0 or done == settings.iterations:
            on_checkpoint(done)
            keep(done)


def _bring_back(folder: RunFolder, name: str, state: Mapping[str, Stateful]) -> int | None:
    """Restore the checkpoint and return its iteration, None if there is none; what was read is not
    held on to.
    """
    kept = folder.load(name)
    if kept is None:
        return None
    for key, holder in state.items():
        holder.load_state_dict(kept[key])
    return int(kept["iteration"])


def finite(loss: Tensor, what: str, iteration: int, settings: LoopSettings) -> Tensor:
    """Return the loss, or raise TrainingError if it is NaN or infinite, in every process if it is
    in one.
    """
    mean = loss.detach().clone()
    average([mean])
    if torch.isfinite(mean).all():
        return loss
    raise TrainingError(
        f"The {what} loss is {mean.item()} at iteration {iteration}. The last checkpoint is whole: lower learning_rate "
        f"(now {settings.learning_rate}) or set precision to fp32 under another --out, and run the command again."
    )
