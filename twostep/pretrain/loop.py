"""The training of one network by itself, on the loop and the optimiser step of every training.

The rate warms up, stays constant for long, and decays at the end. A run that is to be made longer
can start again from any checkpoint before the decay: until there it is the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from twostep.training.compiling import REPEATED, uncompiled
from twostep.training.figures import Figures
from twostep.training.loop import (
    MovingAverage,
    OnIteration,
    Pace,
    Randomness,
    check_number,
    learning_rate_factor,
    run_loop,
)
from twostep.training.optimiser import (
    OptimiserSettings,
    OptimiserState,
    Trainable,
    effective_rate,
    make_optimiser,
    optimiser_step,
)
from twostep.training.processes import world
from twostep.training.recipe import WHILE_RUNNING, RecipeError, Settings
from twostep.training.replicas import Replica
from twostep.training.run_folder import RunFolder

BLOCKS = (*REPEATED, "CLIPEncoderLayer")
"""The blocks of which the networks here consist, by the names of their classes."""

Loss = Callable[[int, Randomness], Tensor]
"""Called with the iteration and its randomness; returns a scalar with its graph.

Of several processes each draws the randomness of the whole batch and returns the mean loss of its
share (`training.processes.World.share`), so a recipe means the same for any number of them.
"""


class NetworkLoopSettings(OptimiserSettings):
    """The loop and the optimiser of one network's training."""

    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay", json_schema_extra=WHILE_RUNNING
    )
    decay_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of the iterations over which the rate decays",
        json_schema_extra=WHILE_RUNNING,
    )
    gradient_clip: float = Field(
        1.0, gt=0, description="largest gradient norm", json_schema_extra=WHILE_RUNNING
    )


class PartSettings(Settings):
    """What the recipe of every part says.

    `learns_from_drawings` is whether the part is trained on pictures of drawings.
    """

    learns_from_drawings: ClassVar[bool] = True

    size: str = Field("nano", description="size of the model that the part belongs to")
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, mps; auto is the accelerator if there is one"
    )
    loop: NetworkLoopSettings


def silent(iteration: int, figures: dict[str, float]) -> None:
    """Show nothing of an iteration."""


def train_network(
    network: Trainable,
    loss: Loss,
    settings: NetworkLoopSettings,
    folder: RunFolder,
    name: str,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train a network, or a LoRA on one, in place, and leave its averaged weights in it.

    Args:
        network: whose parameters are trained, on the device where they are.
        loss: the loss of an iteration.
        settings: iterations, optimiser, precision, seed.
        folder: the run folder, from whose checkpoint the training goes on.
        name: of the checkpoint, of the part in the log, and of the loss in messages.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint, with the averaged weights in the network.

    Raises:
        RecipeError: the batch cannot be shared out to the processes that there are.
        TrainingError: the loss is not finite.
    """
    num_processes = world().size
    if settings.batch_size % num_processes:
        raise RecipeError(
            f"batch_size {settings.batch_size} cannot be shared by {num_processes} processes: "
            f"give a multiple of {num_processes}, or start fewer processes."
        )
    optimiser = make_optimiser(
        network,
        settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        name=settings.optimiser,
    )
    average = MovingAverage(network, settings.ema_decay)
    replica = Replica(network)
    device_type = next(iter(network.parameters())).device.type
    pace = Pace(settings)

    def iterate(iteration: int, randomness: Randomness) -> Figures:
        with settings.autocast(device_type):
            value = replica.loss(lambda: loss(iteration, randomness))
        factor = learning_rate_factor(iteration, settings, pace.iterations)
        optimiser_step(value, optimiser, network, clip=settings.gradient_clip, factor=factor)
        average.update()
        return {"loss": value, "rate": effective_rate(optimiser)}

    def check(iteration: int, figures: dict[str, float]) -> None:
        check_number(figures["loss"], name, iteration, settings)

    def show_averaged(iteration: int) -> None:
        with average.applied(), uncompiled():
            on_checkpoint(iteration)

    state: dict[str, Stateful] = {
        "network": network,
        "optimiser": OptimiserState(optimiser),
        "average": average,
    }
    run_loop(
        iterate,
        settings,
        folder,
        name=name,
        state=state,
        pace=pace,
        read_every=settings.read_every(device_type),
        check=check,
        on_iteration=on_iteration,
        on_checkpoint=show_averaged,
    )
    network.load_state_dict(average.weights)
