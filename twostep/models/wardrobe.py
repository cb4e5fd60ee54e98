"""A model that is loaded once, and worn with another stack of LoRAs at every request.

A stack is a bundle of its own: copies of the networks' modules that hold the very same weights, and beside every layer
that a LoRA changes its share, y = W x + weight * alpha / rank * up (down x); or, fused, new weights for these layers.
The model itself is never written to. So nothing is ever taken off, the model stays as it was bit for bit, and
different stacks may draw at the same time without waiting for each other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from twostep.models.bundle import Bundle
from twostep.models.dialects import LowRank, find_layer, merge_lora
from twostep.models.worn import Garment


class Wardrobe:
    """A loaded model and the stacks that it was worn in; one that comes again costs nothing, not even a look at disk.

    Move the model to its device and precision before. Not fused, a stack costs no memory beyond its LoRAs, which are
    shared; fused, it costs that of all changed weights, and draws as fast as the model alone. A LoRA's file is read
    again, if it may have changed, by a new wardrobe.
    """

    def __init__(self, bundle: Bundle, *, fused: bool = False, num_kept: int = 8) -> None:
        self.bundle, self.fused = bundle, fused
        self._wear, self._read = lru_cache(num_kept)(self._put_on), lru_cache(num_kept)(self._take_out)

    def wear(self, loras: Sequence[str]) -> Bundle:
        """Return the model with these LoRAs on, in order, each "file" or "file:weight"; none is the model itself.

        The last `num_kept` stacks, and as many files, are kept. Raises ModelError, ContractError as `load_worn`.
        """
        return self._wear(tuple(loras))

    def _put_on(self, loras: tuple[str, ...]) -> Bundle:
        contract, worn = self.bundle.contract, [Garment.named(lora) for lora in loras]
        for garment in worn:
            contract = garment.together(contract)
        stack = [(garment.weight, self._read(replace(garment, weight=1.0))) for garment in worn]
        layers = list(dict.fromkeys(chain.from_iterable(lora for _, lora in stack)))
        changed = {layer.partition(".")[0] for layer in layers}
        parts = {part: _sharing(net) if part in changed else net for part, net in self.bundle.parts.items()}
        for name in layers:
            layer = find_layer(parts, name)
            if self.fused:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
            else:
                _put_beside(layer, [(weight, lora[name]) for weight, lora in stack if name in lora])
        for weight, lora in stack if self.fused else ():
            merge_lora(lora, parts, weight=weight)
        return replace(_with_parts(self.bundle, parts), contract=contract)

    def _take_out(self, garment: Garment) -> Mapping[str, LowRank]:
        """Read a LoRA; what is computed beside the layers has their shape and precision, and lies where they do."""
        lora, parts = garment.read(self.bundle.parts), self.bundle.parts
        return lora if self.fused else {name: _fitted(low, find_layer(parts, name)) for name, low in lora.items()}


def _sharing(network: nn.Module) -> nn.Module:
    """Copy a network's modules, not its weights."""
    return copy.deepcopy(network, {id(kept): kept for kept in chain(network.parameters(), network.buffers())})


def _fitted(low: LowRank, layer: nn.Linear | nn.Conv2d) -> LowRank:
    weight = layer.weight
    down, up = low.down.reshape(low.rank, *weight.shape[1:]), low.up.reshape(len(weight), -1, *[1] * (weight.dim() - 2))
    return replace(low, down=down.to(weight), up=up.to(weight))


def _put_beside(layer: nn.Linear | nn.Conv2d, stack: list[tuple[float, LowRank]]) -> None:
    """Add what the LoRAs make of a layer's input to its output."""

    def add(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        for weight, low in stack:
            if isinstance(layer, nn.Linear):
                change = F.linear(F.linear(inputs[0], low.down) * (weight * low.alpha / low.rank), low.up)
            else:
                inner = F.conv2d(inputs[0], low.down, None, layer.stride, layer.padding, layer.dilation)
                change = F.conv2d(inner * (weight * low.alpha / low.rank), low.up)
            output = output + change
        return output

    layer.register_forward_hook(add)


def _with_parts(bundle: Bundle, parts: Mapping[str, Any]) -> Bundle:
    encoders = (parts["text_encoder"], parts["text_encoder_2"])
    return replace(
        bundle, denoiser=replace(bundle.denoiser, network=parts["unet"]), text=replace(bundle.text, encoders=encoders)
    )
