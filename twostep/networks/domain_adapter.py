"""A domain adapter: a small LoRA on a picture UNet, below a motion module (section 4.1 of arXiv
2307.04725).

AnimateDiff's takes up what sets single frames apart from the pictures that the model learnt from:
things beside the middle, small ones, turned ones. Here it takes up words, too: a picture model that
has never read "moving left" overlooks it, and a motion module sees nothing but what the picture
model makes of a caption. An adapter is on all layers, or on those alone that read captions: the
attentions to the text, and the embedding of the pooled text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from twostep.formats.lora_kinds import LowRank
from twostep.formats.peft_config import LoraError
from twostep.networks.adapters import PREFIX

Layers = Literal["captions", "all"]
"""Which layers of a UNet an adapter is on."""

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
    """Two matrices for each of some layers of a UNet; two convolutions for a convolution.

    Args:
        layers: Their names, with the shapes of their weights.
        rank: Of the matrices.
    """

    def __init__(self, layers: Mapping[str, Sequence[int]], rank: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.rank = rank
        generator = torch.Generator().manual_seed(0)
        self.down = nn.ParameterList(
            torch.randn(rank, *read, generator=generator) / math.sqrt(math.prod(read))
            for _, *read in layers.values()
        )
        self.up = nn.ParameterList(
            torch.zeros(width, rank, *[1] * len(kernel)) for width, _, *kernel in layers.values()
        )

    @classmethod
    def on(cls, unet: nn.Module, rank: int, *, layers: Layers = "captions") -> DomainAdapter:
        """Return a fresh adapter for a UNet, which changes nothing yet.

        Args:
            unet: A picture UNet by diffusers' names.
            rank: Of the matrices.
            layers: Those that read captions, or all linear layers and convolutions.
        """
        shapes = {
            name: tuple(module.weight.shape)
            for name, module in unet.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and (layers == "all" or name.endswith(_READS_TEXT))
        }
        return cls(shapes, rank)

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
            name: (len(change.up), *change.down.shape[1:]) for name, change in products.items()
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
        down, up = self.down[place], self.up[place]
        if isinstance(layer, nn.Conv2d):
            fewer = functional.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding)
            return out + functional.conv2d(fewer, up)
        return out + functional.linear(functional.linear(inputs[0], down), up)
