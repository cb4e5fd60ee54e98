"""Gradient checkpointing of one layer: what is inside it is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def computed(layer: Callable[..., Any], recompute: bool, *inputs: Any) -> Any:
    """Return what a layer makes of inputs, which it may compute again in the backward pass."""
    if recompute:
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
