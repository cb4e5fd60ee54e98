"""A domain adapter: a small LoRA on a picture UNet, below a motion module (section 4.1 of arXiv
2307.04725).

AnimateDiff's takes up what sets single frames apart from the pictures that the model learnt from.
Here it takes up words, too: a picture model that has never read "moving left" overlooks it, and a
motion module sees nothing but what the picture model makes of a caption. So the adapter changes
what reads captions: the attentions to the text, and the embedding of the pooled text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from twostep.formats.lora_kinds import LowRank
from twostep.formats.peft_config import LoraError
from twostep.networks.adapters import PREFIX

_READS_TEXT = (
    ".attn2.to_q",
    ".attn2.to_k",
    ".attn2.to_v",
    ".attn2.to_out.0",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
)
"""Endings of the names of the layers that have to do with the caption."""


class DomainAdapter(nn.Module):
    """Two matrices for each of the layers of a UNet that read the caption.

    Args:
        layers: Their names, with how many values come in and go out.
        rank: Of the matrices.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.rank = rank
        generator = torch.Generator().manual_seed(0)
        self.down = nn.ParameterList(
            torch.randn(rank, width_in, generator=generator) / math.sqrt(width_in)
            for width_in, _ in layers.values()
        )
        self.up = nn.ParameterList(torch.zeros(width, rank) for _, width in layers.values())

    @classmethod
    def on(cls, unet: nn.Module, rank: int) -> DomainAdapter:
        """Return a fresh adapter for a UNet, which changes nothing yet."""
        layers = {
            name: (module.in_features, module.out_features)
            for name, module in unet.named_modules()
            if name.endswith(_READS_TEXT) and isinstance(module, nn.Linear)
        }
        return cls(layers, rank)

    @classmethod
    def of(cls, changes: Mapping[str, Any]) -> DomainAdapter:
        """Return the adapter of a LoRA, as `formats.lora_files.read_lora` reads it.

        Raises LoraError for one that is none of the UNet alone, or has several ranks.
        """
        products = {
            name.removeprefix(PREFIX): change
            for name, change in changes.items()
            if name.startswith(PREFIX) and isinstance(change, LowRank)
        }
        ranks = {change.rank for change in products.values()}
        if len(products) < len(changes) or len(ranks) != 1:
            raise LoraError(
                "a domain adapter is a LoRA of one rank on the UNet alone, and this is another."
            )
        shapes = {
            name: (change.down.shape[1], change.up.shape[0]) for name, change in products.items()
        }
        adapter = cls(shapes, ranks.pop())
        for place, change in enumerate(products.values()):
            adapter.down[place].data = change.down.float()
            adapter.up[place].data = change.up.float() * change.alpha / change.rank
        return adapter

    def changes(self) -> dict[str, LowRank]:
        """Return it as a LoRA, as `formats.lora_files.write_lora` writes it."""
        pairs = zip(self.layers, self.down, self.up, strict=True)
        return {
            f"{PREFIX}{name}": LowRank(down.detach(), up.detach(), float(self.rank))
            for name, down, up in pairs
        }

    @contextmanager
    def applied(self, unet: nn.Module) -> Iterator[None]:
        """Let a UNet compute with the adapter in the block, which can be trained there."""
        handles = [
            unet.get_submodule(name).register_forward_hook(partial(self._add, place))
            for place, name in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, place: int, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        changed: Tensor = out + (inputs[0] @ self.down[place].mT) @ self.up[place].mT
        return changed
