"""Names for the shapes of tensors, used in the signatures of all rooms.

Tests check them at every call; in production they cost nothing. And `as_column`, which gives one
value per item a shape that broadcasts against the items, and `sent`, which brings values to them.
"""

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor

Values = Float[Tensor, "*shape"]
"""Any tensor; all values in one signature have the same shape."""

Coefficients = Float[Tensor, "*#shape"]
"""A tensor that broadcasts against `Values`."""

Batch = Float[Tensor, "batch *shape"]
"""Items of any kind, one after the other."""

Latents = Float[Tensor, "batch c h w"]
"""Latents of pictures."""

Times = Real[Tensor, " batch"]
"""One time per item, from 0 (clean) to the top of the schedule (pure noise); integer or real."""

Time = int | float
"""One time, or a share of the way from clean data to pure noise, as a number."""


_QUEUEING = ("cuda",)
"""Types of devices that have copied what lies in ordinary memory before `to` returns, also where
it does not wait; of others that is not known.
"""


def as_column(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per item, shaped [batch, 1, ...], on the device of the items `like`."""
    return sent(values, like.device).view(-1, *[1] * (like.ndim - 1))


def sent(values: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Return values on a device, without waiting for what a GPU still has to compute before it."""
    without_waiting = values.device.type == "cpu" and device.type in _QUEUEING
    return values.to(device, non_blocking=without_waiting)
