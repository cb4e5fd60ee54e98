"""The descent of everything that is trained by itself: AdamW, clipped gradients, averaged weights.

The rate warms up, stays constant for long, and decays at the end.

A run that is to be made longer can start again from any checkpoint before the decay: until there it
is the same run.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from twostep.training.loop import (
    LoopSettings,
    MovingAverage,
    OnIteration,
    Randomness,
    check_finite,
    learning_rate_factor,
    run_loop,
)
from twostep.training.optimiser import make_optimiser, optimiser_step
from twostep.training.run_folder import RunFolder


class DescentSettings(LoopSettings):
    """What one network's descent needs beside the loop."""

    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    decay_share: float = Field(
        0.25, gt=0, le=1, description="share of the iterations over which the rate decays"
    )
    gradient_clip: float = Field(1.0, gt=0, description="largest gradient norm")


Loss = Callable[[int, Randomness], Tensor]


def silent(iteration: int, figures: dict[str, float]) -> None:
    """Show nothing of an iteration."""


def train(
    network: nn.Module,
    loss: Loss,
    settings: DescentSettings,
    folder: RunFolder,
    name: str,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train `network` in place on `loss(iteration, draw)` and leave its averaged weights in it.

    `on_checkpoint` sees the network with its averaged weights. Raises TrainingError on a loss that
    is not finite.
    """
    optimiser = make_optimiser(network, settings.learning_rate, weight_decay=settings.weight_decay)
    average = MovingAverage(network, settings.ema_decay)
    device = next(network.parameters()).device.type

    def iterate(iteration: int, draw: Randomness) -> dict[str, float]:
        with settings.autocast(device):
            value = check_finite(loss(iteration, draw), name, iteration, settings)
        factor = learning_rate_factor(iteration, settings)
        optimiser_step(value, optimiser, network, settings.gradient_clip, factor)
        average.update()
        return {"loss": value.item()}

    def keep(iteration: int) -> None:
        with average.applied():
            on_checkpoint(iteration)

    state: dict[str, Stateful] = {"network": network, "optimiser": optimiser, "average": average}
    run_loop(iterate, settings, folder, name, state, on_iteration=on_iteration, on_checkpoint=keep)
    network.load_state_dict(average.weights)
