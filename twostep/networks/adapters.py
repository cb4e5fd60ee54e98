"""LoRA (arXiv 2106.09685) on a UNet: several adapters on one frozen base, one of them or none at
work at a time.

W' = W + alpha / rank * B A. B starts at zero, so a fresh adapter changes nothing. Which layers get
one is section 3.6 of arXiv 2402.13929: every convolution and linear layer but the first, the last,
and the embedding of time that all blocks share. What an adapter is trained for is unknown here.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from twostep.formats.lora_files import LoraError, read_lora

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *(
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ),
)
"""Ends of the names of the layers that get an adapter: on SDXL 788 of them, 196,751,360 parameters
at rank 64.
"""

PREFIX = "unet."
"""What diffusers puts before the names of a UNet's LoRA in a file."""

_SWITCHING = RLock()


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter on a network, as a thing of its own: it can be trained, kept, averaged and
    brought back.

    It knows its parameters from the first time they are asked for, so one that is put on anew is
    another Lora.
    """

    network: UNet2DConditionModel
    name: str

    @cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by PEFT's names without its own; finding them walks the whole
        network.
        """
        found, named = f".{self.name}.", self.network.named_parameters()
        return {key.replace(found, "."): parameter for key, parameter in named if found in key}

    @property
    def rank(self) -> int:
        """The rank of the adapter's matrices."""
        return int(self.network.peft_config[self.name].r)

    @property
    def targets(self) -> list[str]:
        """The names, or endings of names, of the layers that it was put on."""
        return sorted(self.network.peft_config[self.name].target_modules)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters and nothing of the base."""
        return iter(self._named.values())

    def requires_grad_(self, requires_grad: bool) -> None:
        """Switch the adapter's learning on or off; the base is left as it is."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapter's weights by PEFT's names, which do not depend on the adapter's own."""
        return {key: parameter.detach() for key, parameter in self._named.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take weights over; LoraError where a key is missing, foreign, or of another shape."""
        own = self.state_dict()
        if wrong := sorted(set(own) ^ set(state_dict)):
            raise LoraError(
                f"These weights are of another LoRA: {len(wrong)} keys differ, the first is {wrong[0]}."
            )
        for key, value in state_dict.items():
            if own[key].shape != value.shape:
                raise LoraError(
                    f"{key} is {list(value.shape)}, expected {list(own[key].shape)}: another rank or base."
                )
        set_peft_model_state_dict(self.network, state_dict, adapter_name=self.name)


def add_lora(
    network: UNet2DConditionModel,
    name: str,
    *,
    rank: int,
    targets: Iterable[str] = TARGETS,
    encoder_only: bool = False,
) -> Lora:
    """Put an adapter on every target, at zero and at work; alpha is the rank.

    The base and every other adapter are frozen; this one can be trained. `encoder_only` leaves the
    decoder out. LoraError for a network that takes none.
    """
    targets = list(targets)
    if not targets or not hasattr(network, "add_adapter"):
        raise LoraError(
            f"{type(network).__name__} takes no LoRA. Train the whole network: leave lora_rank out."
        )
    network.requires_grad_(False)
    left_out = r"up_blocks\..*" if encoder_only else None
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, exclude_modules=left_out)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # A starts at random: the same in every run, and nobody else's randomness is moved on.
        torch.manual_seed(0)
        # PEFT wants to make sure that several adapters are meant; they are.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        network.add_adapter(settings, adapter_name=name)
    activate(network, name)
    lora = Lora(network, name)
    for parameter in lora.parameters():
        parameter.data = parameter.data.float()  # whatever the precision of the base
    return lora


def load_lora(network: UNet2DConditionModel, name: str, path: Path) -> Lora:
    """Put a LoRA from a file beside what is there, on the layers that it has and of its own rank,
    alpha in the weights.

    LoraError for one with parts outside the UNet, of several ranks, or that does not fit.
    """
    layers = {
        layer.removeprefix(PREFIX): low for layer, low in read_lora(path, {"unet": network}).items()
    }
    ranks = {low.rank for low in layers.values()}
    if len(ranks) != 1:
        raise LoraError(
            f"{path} has the ranks {sorted(ranks)}. Only a LoRA of one rank can be trained on."
        )
    lora = add_lora(network, name, rank=ranks.pop(), targets=layers)
    ups = {
        f"{layer}.lora_B.weight": low.up.float() * (low.alpha / low.rank)
        for layer, low in layers.items()
    }
    lora.load_state_dict(
        {f"{layer}.lora_A.weight": low.down.float() for layer, low in layers.items()} | ups
    )
    return lora


def has_lora(network: nn.Module, name: str) -> bool:
    """Whether the network carries an adapter of this name, at work or not."""
    return name in (getattr(network, "peft_config", None) or {})


def remove_lora(network: nn.Module, name: str) -> None:
    """Take one adapter off, if it is there."""
    if has_lora(network, name):
        with warnings.catch_warnings():
            # PEFT says which one it puts to work instead; every forward pass chooses its own.
            warnings.filterwarnings("ignore", message="Adapter .* was active")
            network.delete_adapters(name)


def remove_loras(network: nn.Module) -> None:
    """Take every adapter off; the base is as it was before the first."""
    if getattr(network, "peft_config", None):
        network.unload_lora()
        network.peft_config = {}


def activate(network: nn.Module, name: str | None) -> None:
    """Let one adapter work, or none; which parameters can be trained is left as it is.

    Costs next to nothing, so it may be called before every forward. LoraError for a name that is
    not there.
    """
    there = getattr(network, "peft_config", None) or {}
    if name is not None and name not in there:
        raise LoraError(
            f"There is no LoRA called {name!r} on this network; there are {sorted(there) or 'none'}."
        )
    if there:
        _working(network)[:] = [] if name is None else [name]


@contextmanager
def at_work(network: nn.Module, name: str | None) -> Iterator[None]:
    """Let one adapter work, or none, until the block ends; no other thread switches meanwhile."""
    with _SWITCHING if getattr(network, "peft_config", None) else nullcontext():
        activate(network, name)
        yield


def active(network: nn.Module) -> str | None:
    """Return the name of the adapter that works, None if none does."""
    layer = next(_layers(network), None)
    return (
        None if layer is None or layer.disable_adapters else next(iter(layer.active_adapters), None)
    )


def checkpoint_gradients(network: UNet2DConditionModel) -> None:
    """Compute blocks anew in the backward pass instead of keeping what is inside them: less memory,
    a third slower.

    By then another adapter may be at work; every block is computed anew with the one that it was
    computed with.
    """

    def keep_outside(block: nn.Module, *inputs: Any) -> Any:
        name = active(network)

        def compute(*inputs: Any) -> Any:
            activate(network, name)
            return block(*inputs)

        return checkpoint(compute, *inputs, use_reentrant=False)

    network.enable_gradient_checkpointing(keep_outside)


def merge(network: UNet2DConditionModel, name: str | None) -> UNet2DConditionModel:
    """Return a float32 copy of the network without adapters, this one, if one is named, added to
    its own weights.
    """
    if isinstance(next(network.parameters()), DTensor):  # in shards, which no adapter is put on
        with torch.device("meta"):
            whole = UNet2DConditionModel.from_config(network.config)
        whole.load_state_dict(
            {key: value.full_tensor() for key, value in network.state_dict().items()}, assign=True
        )
        return whole.eval()
    merged = copy.deepcopy(network).float()
    merged.disable_gradient_checkpointing()
    if name is not None:
        merged.fuse_lora(adapter_names=[name])
    remove_loras(merged)
    return merged


class _Working(list[str]):
    """The names of the adapters at work: one list that all layers of a network hold, so writing in
    it switches all.
    """


def _working(network: UNet2DConditionModel) -> _Working:
    """Return the network's list, given to every layer anew where adapters came or went, for then
    PEFT makes others.

    PEFT freezes what it switches off, and a parameter frozen between forward and backward gets no
    gradient.
    """
    layers = _layers(network)
    first = next(layers)
    if isinstance(first.active_adapter, _Working) and not first.disable_adapters:
        return first.active_adapter
    learning = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    working = _Working()
    for layer in (first, *layers):
        layer.enable_adapters(True)
        layer.set_adapter(working)
        assert layer.active_adapters is working, (
            "this PEFT copies the list of active adapters; use another version"
        )
    for parameter, learns in learning:
        parameter.requires_grad_(learns)
    return working


def _layers(network: nn.Module) -> Iterator[BaseTunerLayer]:
    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))
