"""Optimisers by name, and the step that every training takes with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from typing_extensions import Protocol, runtime_checkable

from twostep.training.loop import LoopSettings, training_attention
from twostep.training.recipe import WHILE_RUNNING, RecipeError

OptimiserName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"]
"""AdamW (arXiv 1711.05101), the same with moments of 8 bits (2110.02861), Adafactor (1804.04235),
Prodigy (2306.06101) and Lion (2302.06675).
"""

ADAMS = ("adamw", "adamw8bit", "prodigy")
"""The optimisers that keep Adam's two moments, so that a method's betas are meant for them."""

SHARDED_OPTIMISERS = ("adamw", "lion")
"""The optimisers that need to know no more of a tensor than the part that a process holds."""

_WITHOUT_BETAS = ("adafactor",)
_WITHOUT_EPS = ("adafactor", "lion")
_LIBRARY_OF_OTHERS = "twostep[optimisers]"
_LIBRARY_OF_8_BITS = "twostep[eight-bit]"

_LEAST_SENSIBLE_FACTOR = 0.1
"""Prodigy finds the learning rate itself, and what is given is a factor of it."""

_BLOCK_OF_8_BITS = 256
_FEWEST_IN_8_BITS = 4096
"""Parameters of fewer numbers keep their moments in float32 with adamw8bit."""

_BYTES_OF_FLOAT = 4

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserSettings(LoopSettings):
    """The loop, and the optimiser of every network that is trained in it."""

    optimiser: OptimiserName = Field(
        "adamw",
        description="adamw; adamw8bit, adafactor and lion, which keep less in memory; or prodigy, "
        "which finds the learning rate itself, so that learning_rate is a factor of it, usually 1",
    )
    betas: tuple[Beta, Beta] | None = Field(
        None,
        description="decay of the optimiser's averages, also where a method has its own; adafactor "
        "has none",
        json_schema_extra=WHILE_RUNNING,
    )
    eps: float | None = Field(
        None,
        gt=0,
        description="what is added to the root of the second moment, 1e-8 if not given; adafactor "
        "and lion have none",
        json_schema_extra=WHILE_RUNNING,
    )

    @model_validator(mode="after")
    def _optimiser_knows_its_options(self) -> OptimiserSettings:
        if self.betas is not None and self.optimiser in _WITHOUT_BETAS:
            raise ValueError(f"{self.optimiser} has no betas: leave them out, or choose adamw")
        if self.eps is not None and self.optimiser in _WITHOUT_EPS:
            raise ValueError(f"{self.optimiser} has no eps: leave it out, or choose adamw")
        return self


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
    betas: tuple[float, float] | None = None,
    weight_decay: float = 0.0,
    eps: float | None = None,
    name: OptimiserName = "adamw",
    group_rates: Sequence[float] | None = None,
) -> torch.optim.Optimizer:
    """Make an optimiser of everything trainable.

    Args:
        trainable: whose parameters are optimised.
        learning_rate: the peak learning rate; `optimiser_step` scales it. For prodigy a factor of
            the rate that it finds, for adafactor relative to the size of a parameter's numbers.
        betas: decay of the first and of the second moment, of lion that within a step and that
            between steps; the optimiser's own if not given: (0.9, 0.999), of lion (0.9, 0.99).
        weight_decay: decoupled weight decay per step, relative to the learning rate.
        eps: added to the root of the second moment; the optimiser's own if not given.
        name: of the optimiser.
        group_rates: peaks of the groups of a `Grouped` trainable, instead of one for all.

    Raises:
        RecipeError: a package is missing that the optimiser needs, or it has no such setting.
    """
    groups = _groups(trainable, learning_rate, group_rates)
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if betas is not None:
        if name in _WITHOUT_BETAS:
            raise RecipeError(f"{name} has no betas.")
        options["betas"] = betas
    if eps is not None:
        if name in _WITHOUT_EPS:
            raise RecipeError(f"{name} has no eps.")
        options["eps"] = eps
    if name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, **options)
    if name == "adamw8bit":
        return _adamw_of_8_bits(groups, options)
    if name == "lion":
        return _lion(groups, options)
    _check_rates_of_prodigy([group["lr"] for group in groups])
    return _prodigy(groups, options)


def _adamw_of_8_bits(groups: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise _missing("adamw8bit", _LIBRARY_OF_8_BITS) from error
    optimiser: torch.optim.Optimizer = AdamW8bit(groups, **options)
    return optimiser


def _lion(groups: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer.optimizer import Lion
    except ImportError as error:
        raise _missing("lion", _LIBRARY_OF_OTHERS) from error
    # Parameter by parameter: all at once would take as much again as the parameters.
    optimiser: torch.optim.Optimizer = Lion(groups, **options, foreach=False)
    return optimiser


def _prodigy(groups: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer.optimizer import Prodigy
    except ImportError as error:
        raise _missing("prodigy", _LIBRARY_OF_OTHERS) from error
    # Or else the low rates of a warm-up would be taken for a long way still to go.
    optimiser: torch.optim.Optimizer = Prodigy(
        groups, **options, safeguard_warmup=True, foreach=False
    )
    return optimiser


def _missing(name: str, library: str) -> RecipeError:
    return RecipeError(f'optimiser "{name}" needs `pip install {library}`.')


def _check_rates_of_prodigy(rates: Sequence[float]) -> None:
    """Refuse what Prodigy would pass over in silence, and warn of what it would hardly learn by."""
    if len(set(rates)) > 1:
        raise RecipeError(
            "prodigy finds one learning rate for all parameters of a network, and cannot give "
            f"groups of them their own ({', '.join(f'{rate:g}' for rate in rates)})."
        )
    if rates[0] < _LEAST_SENSIBLE_FACTOR:
        warnings.warn(
            f"prodigy multiplies the rate that it finds with learning_rate, {rates[0]:g}: 1 is "
            "usual",
            stacklevel=3,
        )


def state_bytes(name: OptimiserName, shapes: Iterable[Sequence[int]]) -> int:
    """Return how many bytes an optimiser keeps of parameters, which are float32.

    Args:
        name: of the optimiser.
        shapes: of the parameters.
    """
    return sum(_state_bytes(name, tuple(shape)) for shape in shapes)


def _state_bytes(name: OptimiserName, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if name == "adafactor" and len(shape) > 1:
        # A mean over every row and one over every column, of each of a convolution's matrices.
        count_of_means = count // shape[-1] + count // shape[-2]
        return _BYTES_OF_FLOAT * count_of_means
    if name == "adamw8bit" and count >= _FEWEST_IN_8_BITS:
        num_blocks = -(-count // _BLOCK_OF_8_BITS)
        return 2 * (count + _BYTES_OF_FLOAT * num_blocks)
    num_copies = {"adamw": 2, "adamw8bit": 2, "adafactor": 1, "prodigy": 4, "lion": 1}
    return _BYTES_OF_FLOAT * num_copies[name] * count


def effective_rate(optimiser: torch.optim.Optimizer) -> float:
    """Return the learning rate of an optimiser's last step, of its first group.

    For prodigy it is the product of what it has found and of the rate that it was given.
    """
    group = optimiser.param_groups[0]
    found = group["d"] if "d0" in group else 1.0
    return float(group["lr"] * found)


_SETTINGS = ("betas", "weight_decay", "eps")
"""What of a parameter group is a setting, beside the learning rate, and no state."""


class OptimiserState:
    """An optimiser with its step, and its state for checkpoints, without its settings.

    torch's own state has the settings too, and would bring back those of the checkpoint when a run
    goes on with others.
    """

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        """Hold an optimiser whose settings are the right ones."""
        self.optimiser = optimiser

    def step(self) -> None:
        """Take the optimiser's step down the gradients that are there."""
        self.optimiser.step()

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
) -> Tensor:
    """Go back from a loss and take one optimiser step; return the gradient norm before clipping.

    Args:
        loss: a scalar with its graph, of several processes one that a `Replica` of the same
            `trainable` computed.
        optimiser: made by `make_optimiser` of the same `trainable`.
        trainable: whose gradients are clipped.
        clip: largest norm of all gradients together; longer ones are scaled down to it.
        factor: of the peak learning rate, as of `learning_rate_factor`.
    """
    go_back(loss)
    return step_down(OptimiserState(optimiser), trainable, clip, factor)


def go_back(loss: Tensor) -> None:
    """Add a loss's gradients to those that are there."""
    with training_attention(loss.device.type):
        loss.backward()


def step_down(stepping: OptimiserState, trainable: Trainable, clip: float, factor: float) -> Tensor:
    """Take one optimiser step down the gradients that are there, and clear them.

    Returns the gradient norm before clipping, a scalar that is still on its device: reading it
    would wait for that.

    Args:
        stepping: an optimiser of the same `trainable`, made by `make_optimiser`.
        trainable: whose gradients are clipped.
        clip: largest norm of all gradients together; longer ones are scaled down to it.
        factor: of the peak learning rate, as of `learning_rate_factor`.
    """
    optimiser = stepping.optimiser
    for group in optimiser.param_groups:
        # The peak is kept in the group, and so in checkpoints, because "lr" is overwritten.
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * factor
    parameters = list(trainable.parameters())
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    stepping.step()
    optimiser.zero_grad(set_to_none=True)
    # That of shards is put together on their devices.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
