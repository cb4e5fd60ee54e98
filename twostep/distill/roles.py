"""Roles: the networks that change during a stage, how each starts and how it learns.

Ways to start one:

- `learner`: the student itself, its whole network or its LoRA.
- `copy_of`: a copy of a denoiser, trained as a whole (the fake score of DMD2).
- `adapter_on`: a LoRA on a denoiser's own network, so that the base is in memory only once.
- `moving_average_of`: follows another role's weights (the target of LCM).
- an encoder with heads: see `methods.discriminator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import Protocol, runtime_checkable

from twostep.networks.adapters import Lora, add_lora, has_lora, remove_lora
from twostep.networks.denoiser import Denoiser
from twostep.training.optimiser import ADAMS, OptimiserName, Trainable

if TYPE_CHECKING:
    from twostep.distill.recipe import TrainedStage


@runtime_checkable
class Weights(Trainable, Protocol):
    """Weights that a role trains: those of a module, or of a LoRA on one."""

    def requires_grad_(self, requires_grad: bool, /) -> Any:
        """Let gradients flow into the weights, or not."""


@dataclass(frozen=True)
class OptimiserSettings:
    """The settings of a role's optimiser.

    Args:
        learning_rate: the peak.
        betas: decay of the first and of the second moment; None for the optimiser's own.
        weight_decay: decoupled, relative to the learning rate.
        eps: added to the root of the second moment; None for the optimiser's own.
        name: of the optimiser; all but adamw are other ones than Adam, or Adam kept otherwise.
        group_rates: peaks of the groups that the weights' `parameter_groups` returns; None for one
            rate of all.
    """

    learning_rate: float
    betas: tuple[float, float] | None = None
    weight_decay: float = 0.0
    eps: float | None = None
    name: OptimiserName = "adamw"
    group_rates: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        stage: TrainedStage,
        *,
        betas: tuple[float, float] | None = None,
        learning_rate: float | None = None,
    ) -> OptimiserSettings:
        """Return what a stage says, and what the method says where the stage does not.

        Args:
            stage: whose optimiser it is.
            betas: the method's, if it has any; meant for Adam's moments, so lion and adafactor do
                not take them.
            learning_rate: the role's own; that of the stage if not given.
        """
        if stage.betas is not None:
            betas = stage.betas
        elif stage.optimiser not in ADAMS:
            betas = None
        return cls(
            learning_rate=learning_rate or stage.learning_rate,
            betas=betas,
            weight_decay=stage.weight_decay,
            eps=stage.eps,
            name=stage.optimiser,
        )


@dataclass(frozen=True)
class Follow:
    """How a moving average moves.

    Args:
        role: whose weights are followed.
        decay: share of the old average that remains after a step of that role, in [0, 1).
    """

    role: str
    decay: float


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True, eq=False)
class Role:
    """A network that changes during a stage.

    Args:
        model: what the method's functions get under the role's name.
        weights: what checkpoints keep, and what the optimiser changes.
        optimiser: how it learns by its own loss; None if it never does.
        follow: the role whose weights it averages; None if it follows nobody.
        sharded_methods: methods of the model, beside its call, that need the gathered weights where
            these are spread over processes.
        remove: takes it off the networks of others once the stage is over.
        handed_on: the part of the weights with which a next stage begins that trains the same
            student by the same method; None if it begins anew.
    """

    model: Any
    weights: Weights
    optimiser: OptimiserSettings | None = None
    follow: Follow | None = None
    sharded_methods: tuple[str, ...] = ()
    remove: Callable[[], None] = _nothing
    handed_on: Stateful | None = None


def weights_of(denoiser: Denoiser) -> Weights:
    """Return what is trained of a denoiser: its LoRA if it has one, or else its whole network."""
    if denoiser.lora is None:
        return denoiser.network
    return Lora(denoiser.network, denoiser.lora)


def file_weights(denoiser: Denoiser) -> Mapping[str, Tensor]:
    """Return what a student's file holds: its network, or its LoRA with alpha multiplied in."""
    if denoiser.lora is None:
        weights: Mapping[str, Tensor] = denoiser.network.state_dict()
        return weights
    return Lora(denoiser.network, denoiser.lora).scaled_state_dict()


def learner(denoiser: Denoiser, optimiser: OptimiserSettings) -> Role:
    """Return the role of a denoiser that is trained as it stands."""
    return Role(denoiser, weights_of(denoiser), optimiser)


def copy_of(denoiser: Denoiser, optimiser: OptimiserSettings) -> Role:
    """Return the role of a float32 copy of a denoiser, with its LoRA merged in, trained whole."""
    copied = denoiser.standalone()
    copied.network.requires_grad_(True)
    return learner(copied, optimiser)


def adapter_on(denoiser: Denoiser, name: str, *, rank: int, optimiser: OptimiserSettings) -> Role:
    """Return the role of a new LoRA on a denoiser's network, at first with the same answers.

    Args:
        denoiser: the new LoRA starts as its LoRA, or at zero if it has none.
        name: of the new LoRA; an old one of that name is replaced.
        rank: of the new LoRA; that of the denoiser's own, if it has one.
        optimiser: how it learns.
    """
    network = denoiser.network
    lora = place_lora(denoiser, name, rank=rank)
    model = replace(denoiser, lora=name)
    return Role(model, lora, optimiser, remove=lambda: remove_lora(network, name))


def place_lora(denoiser: Denoiser, name: str, *, rank: int, encoder_only: bool = False) -> Lora:
    """Put a trainable LoRA on a denoiser's network that starts as the denoiser's own LoRA.

    Whatever else could be trained on that network still can be.
    """
    network = denoiser.network
    with _keeping_trainable(network):
        remove_lora(network, name)
        lora = add_lora(
            network,
            name,
            rank=rank,
            targets=denoiser.backbone.spec.lora_targets,
            encoder_only=encoder_only,
        )
    if denoiser.lora is not None:
        # What that LoRA does not change stays at zero.
        start = Lora(network, denoiser.lora).scaled_state_dict()
        fresh = lora.state_dict()
        lora.load_state_dict({key: start.get(key, value) for key, value in fresh.items()})
    lora.requires_grad_(True)
    return lora


@contextmanager
def _keeping_trainable(network: nn.Module) -> Iterator[None]:
    """Let what could be trained before the block be trainable after it: adding a LoRA freezes."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    yield
    for parameter in trainable:
        parameter.requires_grad_(True)


def moving_average_of(role: str, denoiser: Denoiser, *, name: str, decay: float) -> Role:
    """Return the role of a frozen copy of a role's denoiser that follows it from then on.

    Args:
        role: the name of the role that is followed.
        denoiser: that role's model.
        name: of the copy, if it is a LoRA.
        decay: share of the old average that remains after a step.
    """
    if denoiser.lora is None:
        copied = denoiser.standalone()
        copied.network.requires_grad_(False)
        return Role(copied, copied.network, follow=Follow(role, decay))
    copied = frozen_lora_copy(denoiser, name)
    network = denoiser.network
    return Role(
        copied,
        weights_of(copied),
        follow=Follow(role, decay),
        remove=lambda: remove_lora(network, name),
    )


def frozen_lora_copy(denoiser: Denoiser, name: str) -> Denoiser:
    """Return the same denoiser with its LoRA as it is now, frozen, under another name."""
    assert denoiser.lora is not None
    network = denoiser.network
    running = Lora(network, denoiser.lora)
    copied = Lora(network, name)
    if not has_lora(network, name):
        with _keeping_trainable(network):
            copied = add_lora(
                network, name, rank=running.rank, alpha=running.alpha, targets=running.targets
            )
    copied.load_state_dict(running.state_dict())
    copied.requires_grad_(False)
    return replace(denoiser, lora=name)


@torch.no_grad()
def move_average(
    average: Mapping[str, Tensor], current: Mapping[str, Tensor], decay: float
) -> None:
    """Move averaged weights towards the current ones, in place: average = decay * average + ..."""
    keys = [key for key, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_(
        [average[key] for key in keys],
        [current[key].to(average[key].dtype) for key in keys],
        1 - decay,
    )
