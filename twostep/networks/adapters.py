"""LoRA (arXiv 2106.09685) on a backbone: several adapters on one frozen base, at most one active.

W' = W + alpha / rank * B A. B starts at zero, so a fresh adapter changes nothing. The layers that
get one are those of section 3.6 of arXiv 2402.13929: every convolution and linear layer but the
first, the last, and the embedding of time that all blocks share.
"""

import copy
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from twostep.formats.lora_files import read_lora
from twostep.formats.lora_kinds import LowRank
from twostep.formats.peft_config import LoraError

TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Endings of the names of the UNet's layers that get an adapter.

On SDXL these are 788 layers, and 196,751,360 parameters at rank 64.
"""

GROUPS = {
    "attention": r"attn\d\.(to_q|to_k|to_v|to_out\.0)",
    "self-attention": r"attn1\.(to_q|to_k|to_v|to_out\.0)",
    "cross-attention": r"attn2\.(to_q|to_k|to_v|to_out\.0)",
    "feed-forward": r"ff\.net\.(0\.proj|2)",
    "projections": r"proj_(in|out)",
    "convolutions": r"conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv",
    "time": r"time_emb_proj",
}
"""Groups of these layers by the regular expressions that the ends of their names match."""

PREFIX = "unet."
"""What diffusers puts before the names of a UNet's LoRA in a file."""

_DOWN = ".lora_A.weight"
_UP = ".lora_B.weight"
"""How PEFT's names of an adapter's matrices end, that of the second one."""

_SWITCHING = RLock()
"""Held while an adapter is active in a call, for all callers share the network's switch."""


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter on a network, which can be trained, saved, averaged and loaded by itself.

    It looks its parameters up once. After an adapter of the same name was removed and added again,
    make another Lora.

    Args:
        network: The network that carries the adapter.
        name: The adapter's name on that network.
    """

    network: nn.Module
    name: str

    @cached_property
    def _named(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by PEFT's names, without the adapter's name in them."""
        marker = f".{self.name}."
        return {
            key.replace(marker, "."): parameter
            for key, parameter in self.network.named_parameters()
            if marker in key
        }

    @property
    def rank(self) -> int:
        """The rank of the adapter's matrices."""
        return int(_peft_configs(self.network)[self.name].r)

    @property
    def alpha(self) -> float:
        """What the product of the matrices is multiplied with, times the rank."""
        return float(_peft_configs(self.network)[self.name].lora_alpha)

    @property
    def layers(self) -> set[str]:
        """The names of the layers that it changes."""
        return {key.removesuffix(_DOWN) for key in self._named if key.endswith(_DOWN)}

    @property
    def targets(self) -> list[str]:
        """The names, or endings of names, of the layers that it was added to."""
        return sorted(_peft_configs(self.network)[self.name].target_modules)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters and nothing of the base."""
        return iter(self._named.values())

    def requires_grad_(self, requires_grad: bool) -> None:
        """Switch training of the adapter on or off; the base is left as it is."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by PEFT's names, which are the same for every adapter's name."""
        return {key: parameter.detach() for key, parameter in self._named.items()}

    def scaled_state_dict(self) -> dict[str, Tensor]:
        """Return the weights with alpha multiplied in, as of an alpha that is the rank.

        So every program reads them alike, whatever it takes for an alpha that is not in the file.
        """
        scale = self.alpha / self.rank
        weights = self.state_dict()
        if scale == 1:
            return weights
        return {
            key: value * scale if key.endswith(_UP) else value for key, value in weights.items()
        }

    @contextmanager
    def dropout(self, share: float) -> Iterator[None]:
        """Drop a share of the layers' inputs in the block, by torch's global generator.

        Args:
            share: probability that a value of what the adapter (not the base) sees becomes zero.
        """
        # PEFT's layers have it, but their common class does not declare it.
        holders: list[Any] = [getattr(layer, "lora_dropout", {}) for layer in _layers(self.network)]
        holders = [holder for holder in holders if self.name in holder]
        for holder in holders:
            holder[self.name] = nn.Dropout(share)
        try:
            yield
        finally:
            for holder in holders:
                holder[self.name] = nn.Identity()

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Load weights; LoraError where a key is missing, unknown, or of another shape."""
        present = self.state_dict()
        differing = sorted(set(present) ^ set(state_dict))
        if differing:
            raise LoraError(
                f"These weights are of another LoRA: {len(differing)} keys differ, "
                f"the first is {differing[0]}."
            )
        for key, value in state_dict.items():
            if present[key].shape != value.shape:
                raise LoraError(
                    f"{key} is {list(value.shape)}, expected {list(present[key].shape)}: "
                    "another rank or base."
                )
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.network, state_dict, adapter_name=self.name)


def add_lora(
    network: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Iterable[str] = TARGETS,
    encoder_only: bool = False,
) -> Lora:
    """Add an adapter to every target layer, and make it the active one.

    The base and every other adapter are frozen; this one can be trained. Its weights are float32
    whatever the base's precision is.

    Args:
        network: Any network; PEFT puts its layers around those that are meant.
        name: The adapter's name, new on this network.
        rank: The rank of its matrices.
        alpha: What it is multiplied with, times the rank; the rank if not given.
        targets: Names, or endings of names, of the layers that get it.
        encoder_only: Whether to leave the UNet's decoder out.

    Raises:
        LoraError: If the network takes no LoRA.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(targets)
    if not targets:
        raise LoraError(
            f"{type(network).__name__} takes no LoRA. Train the whole network: leave lora_rank out."
        )
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=targets,
        exclude_modules=r"up_blocks\..*" if encoder_only else None,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # A starts at random: the same in every run, without advancing the global generator.
        torch.manual_seed(0)
        # PEFT warns of a second adapter; here several on one base are the normal case.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    activate(network, name)
    lora = Lora(network, name)
    for parameter in lora.parameters():
        parameter.data = parameter.data.float()
    return lora


def choose_layers(
    network: nn.Module, names: Iterable[str], targets: Iterable[str] = TARGETS
) -> list[str]:
    """Return the layers that are meant, in the network's order.

    Args:
        network: That has them.
        names: Of `GROUPS`; patterns of whole names, as "down_blocks.*.attn2.*"; or names or endings
            of names, as "to_k".
        targets: Endings of the names of the layers that may get an adapter at all.

    Raises:
        LoraError: If one of the names means no layer.
    """
    may_end = tuple(f".{target}" for target in targets)
    possible = [name for name, _ in network.named_modules() if f".{name}".endswith(may_end)]
    chosen: set[str] = set()
    for name in names:
        expression = GROUPS.get(name, fnmatch.translate(name))
        ending = re.compile(rf"(.*\.)?({expression})")
        meant = [layer for layer in possible if ending.fullmatch(layer)]
        if not meant:
            example = f", as {possible[0]}" if possible else ""
            raise LoraError(
                f"No layer that a LoRA can change is called {name!r}. Give some of "
                f"{', '.join(GROUPS)}, or names, endings or patterns of layers{example}."
            )
        chosen.update(meant)
    return [layer for layer in possible if layer in chosen]


def load_lora(
    network: nn.Module,
    name: str,
    path: Path,
    *,
    alpha: float | None = None,
    only: Iterable[str] | None = None,
) -> Lora:
    """Add an adapter from a file, on the file's layers and at the file's rank.

    Args:
        network: Any network.
        name: The adapter's name, new on this network.
        path: The file.
        alpha: Of the adapter, which does not change what it does at first: the file's own alpha is
            multiplied into the weights. The rank if not given.
        only: Names of layers; the file must change no others.

    Raises:
        LoraError: If the file changes parts beside the UNet, mixes ranks, or does not fit.
    """
    layers = {}
    for layer, change in read_lora(path, {"unet": network}).items():
        if not isinstance(change, LowRank):
            raise LoraError(
                f"{path} has a {change.kind} for {layer}. Only a LoRA can be trained on; merge "
                "this into the model that is trained (twostep export --lora)."
            )
        layers[layer.removeprefix(PREFIX)] = change
    ranks = {low_rank.rank for low_rank in layers.values()}
    if len(ranks) != 1:
        raise LoraError(
            f"{path} has the ranks {sorted(ranks)}. Only a LoRA of one rank can be trained on."
        )
    if only is not None and (others := sorted(layers.keys() - set(only))):
        raise LoraError(
            f"{path} changes {len(others)} layers that lora_targets leaves out, as {others[0]}. "
            "Leave lora_targets out to train on the layers of the file."
        )
    rank = ranks.pop()
    lora = add_lora(network, name, rank=rank, alpha=alpha, targets=only or layers)
    # Layers that the file does not change begin at zero.
    weights = lora.state_dict()
    for layer, low_rank in layers.items():
        scale = low_rank.alpha / lora.alpha
        weights[f"{layer}{_DOWN}"] = low_rank.down.float()
        weights[f"{layer}{_UP}"] = low_rank.up.float() * scale
    lora.load_state_dict(weights)
    return lora


def has_lora(network: nn.Module, name: str) -> bool:
    """Whether the network carries an adapter of this name, active or not."""
    return name in _peft_configs(network)


def remove_lora(network: nn.Module, name: str) -> None:
    """Remove one adapter, if the network carries it."""
    if not has_lora(network, name):
        return
    with warnings.catch_warnings():
        # PEFT says which adapter it activates instead; here every forward pass chooses its own.
        warnings.filterwarnings("ignore", message="Adapter .* was active")
        for layer in _layers(network):
            layer.delete_adapter(name)
    del _peft_configs(network)[name]


def remove_loras(network: nn.Module) -> None:
    """Remove every adapter; the base is as it was before the first."""
    if not _peft_configs(network):
        return
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(network)
    adaptable: Any = network
    adaptable.peft_config = {}


def fuse(network: nn.Module, name: str | None) -> None:
    """Merge one adapter into the weights, or none, and remove all, in place."""
    if name is not None:
        for layer in _layers(network):
            layer.merge(adapter_names=[name])
    remove_loras(network)


def activate(network: nn.Module, name: str | None) -> None:
    """Make one adapter the active one, or none; what can be trained is left as it is.

    Costs next to nothing, so it may be called before every forward pass. Raises LoraError for an
    adapter that the network does not carry.
    """
    present = _peft_configs(network)
    if name is not None and name not in present:
        raise LoraError(
            f"There is no LoRA called {name!r} on this network; "
            f"there are {sorted(present) or 'none'}."
        )
    if present:
        _active_names(network)[:] = [] if name is None else [name]


@contextmanager
def activated(network: nn.Module, name: str | None) -> Iterator[None]:
    """Keep one adapter active, or none, for a block; other threads wait before they switch."""
    with _SWITCHING if _peft_configs(network) else nullcontext():
        activate(network, name)
        yield


def active(network: nn.Module) -> str | None:
    """Return the name of the active adapter, None if there is none."""
    layer = next(_layers(network), None)
    if layer is None or layer.disable_adapters:
        return None
    return next(iter(layer.active_adapters), None)


def checkpoint_gradients(network: Any) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations.

    Saves memory and costs about a third more time. Another adapter may be active by the time of
    the backward pass: every block is recomputed with the one that it was first computed with.
    """

    from torch.utils.checkpoint import checkpoint

    def run_block(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(with_current_adapter(network, block), *inputs, use_reentrant=False)

    network.enable_gradient_checkpointing(run_block)


def with_current_adapter(network: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that first activates the adapter that is active now, or none."""
    name = active(network)

    def activate_and_compute(*inputs: Any) -> Any:
        activate(network, name)
        return compute(*inputs)

    return activate_and_compute


def merge(network: Any, name: str | None) -> Any:
    """Return a float32 copy of diffusers' UNet without adapters, the named one merged into it."""
    from torch.distributed.tensor import DTensor

    if isinstance(next(network.parameters()), DTensor):
        # A sharded network carries no adapter, and cannot be copied as a module.
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            whole = UNet2DConditionModel.from_config(network.config)
        weights = {key: value.full_tensor() for key, value in network.state_dict().items()}
        whole.load_state_dict(weights, assign=True)
        return whole.eval()
    merged = copy.deepcopy(network).float()
    merged.disable_gradient_checkpointing()
    fuse(merged, name)
    return merged


class _ActiveNames(list[str]):
    """The active adapters' names: one list that all layers share, so writing to it switches all."""


def _active_names(network: nn.Module) -> _ActiveNames:
    """Return the list that the network's layers share, and give it to them where they do not.

    PEFT makes other lists whenever an adapter is added or removed. Its own way of switching
    freezes what it switches off, and a parameter that is frozen between the forward and the
    backward pass gets no gradient.
    """
    first = next(_layers(network))
    if isinstance(first.active_adapter, _ActiveNames) and not first.disable_adapters:
        return first.active_adapter
    trainable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    names = _ActiveNames()
    for layer in _layers(network):
        layer.enable_adapters(True)
        layer.set_adapter(names)
        assert layer.active_adapters is names, (
            "this PEFT copies the list of active adapters; use another version"
        )
    for parameter, requires_grad in trainable:
        parameter.requires_grad_(requires_grad)
    return names


def _peft_configs(network: nn.Module) -> dict[str, Any]:
    """Return PEFT's configs of the adapters that the network carries, by their names."""
    return getattr(network, "peft_config", None) or {}


def _layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))
