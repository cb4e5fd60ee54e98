"""Optimisers, and the step that every training takes with them."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from typing_extensions import Protocol, runtime_checkable

from twostep.training.loop import training_attention
from twostep.training.processes import average
from twostep.training.recipe import RecipeError

OptimiserName = Literal["adamw", "adamw8bit"]
"""AdamW (arXiv 1711.05101), or the same with moments of 8 bits (arXiv 2110.02861)."""


@runtime_checkable
class Trainable(Stateful, Protocol):
    """What an optimiser can train and a checkpoint can keep: a network, or a LoRA on one."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are trained."""


@runtime_checkable
class Grouped(Protocol):
    """Something trainable whose parameters fall into groups that may learn at their own rates."""

    def parameter_groups(self) -> Sequence[Iterator[nn.Parameter]]:
        """Return the parameters, every one in one group."""


def make_optimiser(
    trainable: Trainable,
    learning_rate: float,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    name: OptimiserName = "adamw",
    group_rates: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """Make an AdamW optimiser of everything trainable; RecipeError if the 8-bit one is missing.

    Args:
        trainable: whose parameters are optimised.
        learning_rate: the peak learning rate; `optimiser_step` scales it.
        betas: decay of the first and of the second moment.
        weight_decay: decoupled weight decay per step, relative to the learning rate.
        name: "adamw", or "adamw8bit", which needs the package bitsandbytes.
        group_rates: peaks of the groups of a `Grouped` trainable, instead of one for all.
    """
    groups = _groups(trainable, learning_rate, group_rates)
    if name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=learning_rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise RecipeError(f'optimiser "{name}" needs `pip install twostep[eight-bit]`.') from error
    optimiser: torch.optim.Optimizer = AdamW8bit(
        groups,
        lr=learning_rate,
        betas=betas,
        weight_decay=weight_decay,
    )
    return optimiser


_SETTINGS = ("betas", "weight_decay", "eps")
"""What of a parameter group is a setting, beside the learning rate, and no state."""


class OptimiserState:
    """The state of an optimiser for checkpoints, without its settings.

    torch's own state has the settings too, and would bring back those of the checkpoint when a run
    goes on with others.
    """

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        """Hold an optimiser whose settings are the right ones."""
        self.optimiser = optimiser

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's own state."""
        return self.optimiser.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned, with the settings of now."""
        settings = [
            {"peak": group.get("peak", group["lr"])}
            | {key: group[key] for key in _SETTINGS if key in group}
            for group in self.optimiser.param_groups
        ]
        self.optimiser.load_state_dict(state_dict)
        for group, own in zip(self.optimiser.param_groups, settings, strict=True):
            group.update(own)


def _groups(
    trainable: Trainable, learning_rate: float, group_rates: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Return the parameters with their peaks, as torch's optimisers take them."""
    if group_rates is None:
        return [{"params": list(trainable.parameters()), "lr": learning_rate}]
    assert isinstance(trainable, Grouped)
    groups = trainable.parameter_groups()
    return [
        {"params": list(parameters), "lr": rate}
        for parameters, rate in zip(groups, group_rates, strict=True)
    ]


def optimiser_step(
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    trainable: Trainable,
    clip: float,
    factor: float,
) -> float:
    """Go back from a loss and take one optimiser step; return the gradient norm before clipping.

    Of several processes every one must call it: gradients are averaged over them before they are
    clipped, so all take the same step.

    Args:
        loss: a scalar of this process with its graph.
        optimiser: made by `make_optimiser` of the same `trainable`.
        trainable: whose gradients are averaged and clipped.
        clip: largest norm of all gradients together; longer ones are scaled down to it.
        factor: of the peak learning rate, as of `learning_rate_factor`.
    """
    go_back(loss)
    return step_down(optimiser, trainable, clip, factor)


def go_back(loss: Tensor) -> None:
    """Add a loss's gradients to those that are there."""
    with training_attention(loss.device.type):
        loss.backward()


def step_down(
    optimiser: torch.optim.Optimizer, trainable: Trainable, clip: float, factor: float
) -> float:
    """Take one optimiser step down the gradients that are there, and clear them.

    Of several processes every one must call it. Returns the gradient norm before clipping.

    Args:
        optimiser: made by `make_optimiser` of the same `trainable`.
        trainable: whose gradients are averaged and clipped.
        clip: largest norm of all gradients together; longer ones are scaled down to it.
        factor: of the peak learning rate, as of `learning_rate_factor`.
    """
    for group in optimiser.param_groups:
        # The peak is kept in the group, and so in checkpoints, because "lr" is overwritten.
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * factor
    parameters = list(trainable.parameters())
    average([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm.item()
