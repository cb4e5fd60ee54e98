"""Optimiser state that waits in main memory while an accelerator computes something else.

A step takes the parameters portion by portion: it brings a portion's state to the accelerator,
lets the optimiser step, and takes the state back. So no more than one portion of it is ever there,
and every number is what it would have been.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from twostep.training.optimiser import OptimiserName, OptimiserState, state_bytes

PORTION_BYTES = 2**28
"""Bytes of the parameters whose state is brought together, if one parameter has not more."""

_MAIN_MEMORY = torch.device("cpu")

_AT_ONCE = ("prodigy",)
"""The optimisers that look at all parameters of a network in every step."""


class OffloadedState(OptimiserState):
    """The state of an optimiser that is in main memory but for the steps."""

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        name: OptimiserName,
        *,
        portion_bytes: int = PORTION_BYTES,
    ) -> None:
        """Take over an optimiser that has taken no step yet.

        Args:
            optimiser: of `make_optimiser`.
            name: of the optimiser.
            portion_bytes: bytes of the parameters whose state is brought together.
        """
        super().__init__(optimiser)
        self._parameters = [
            parameter for group in optimiser.param_groups for parameter in group["params"]
        ]
        sizes = [parameter.shape for parameter in self._parameters]
        self._portions = [
            self._parameters[first:last]
            for first, last in portions(name, sizes, portion_bytes=portion_bytes)
        ]

    def step(self) -> None:
        """Take the optimiser's step down the gradients that are there, which it uses up."""
        gradients = deque(parameter.grad for parameter in self._parameters)
        for parameter in self._parameters:
            parameter.grad = None
        for portion in self._portions:
            for parameter in portion:
                parameter.grad = gradients.popleft()
            if any(parameter.grad is not None for parameter in portion):
                self._bring(portion)
                self.optimiser.step()
                self._take_back(portion)
            for parameter in portion:
                parameter.grad = None

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned, without bringing it to the accelerator at once."""
        settings = {"state": {}, "param_groups": state_dict["param_groups"]}
        super().load_state_dict(settings)
        for index, kept in state_dict["state"].items():
            self.optimiser.state[self._parameters[index]] = {
                key: moved(value, _MAIN_MEMORY) if isinstance(value, Tensor) else value
                for key, value in kept.items()
            }

    def _bring(self, portion: Sequence[nn.Parameter]) -> None:
        for parameter in portion:
            self._move(parameter, parameter.device)

    def _take_back(self, portion: Sequence[nn.Parameter]) -> None:
        for parameter in portion:
            self._move(parameter, _MAIN_MEMORY)

    def _move(self, parameter: nn.Parameter, device: torch.device) -> None:
        state = self.optimiser.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = moved(value, device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the same one if it is there."""
    return value.to(device)


def portions(
    name: OptimiserName, shapes: Sequence[Sequence[int]], *, portion_bytes: int = PORTION_BYTES
) -> Iterator[tuple[int, int]]:
    """Yield the portions of parameters that take a step together, as positions [first, last).

    Args:
        name: of the optimiser.
        shapes: of the parameters, which are float32.
        portion_bytes: of the parameters of a portion, at most, unless a single one has more.
    """
    if name in _AT_ONCE:
        yield 0, len(shapes)
        return
    first = size = 0
    for position, shape in enumerate(shapes):
        num_bytes = 4 * torch.Size(shape).numel()
        if position > first and size + num_bytes > portion_bytes:
            yield first, position
            first, size = position, 0
        size += num_bytes
    yield first, len(shapes)


def bytes_at_once(name: OptimiserName, shapes: Sequence[Sequence[int]]) -> int:
    """Return the most bytes of an optimiser's state that are on the accelerator at once."""
    return max(state_bytes(name, shapes[first:last]) for first, last in portions(name, shapes))
