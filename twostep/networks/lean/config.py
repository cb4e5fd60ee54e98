"""A network's config: what it is built by, with its entries as attributes too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Config(dict[str, Any]):
    """The entries of a config.json, by name and as attributes."""

    def __getattr__(self, name: str) -> Any:
        """Return an entry; AttributeError where there is none."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no entry {name!r}") from None


class LeanNetwork(nn.Module):
    """A network with the config that it was built by.

    Args:
        config: Its entries.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Config(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.parameters()).dtype


def has_entries(config: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Tell whether a config has these values; a tuple of them lists several that will do.

    An entry that is not there counts as None.
    """
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(name) not in allowed:
            return False
    return True


def per_level(value: int | Sequence[Any], count: int) -> list[Any]:
    """Return one value for each of so many levels: a single one stands for all."""
    return [value] * count if isinstance(value, int) else list(value)
