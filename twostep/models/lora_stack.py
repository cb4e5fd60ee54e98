"""LoRAs on a model: which one may go on which, how the two are then sampled, and how to change them
without changing the model.

A LoRA without a contract is a style and changes no steps. One with a contract makes a teacher a
student of few steps, or is a style that was trained on one student, and goes on that one alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from twostep.contract import Contract, ContractError, student_name
from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.contracts import goes_on_a_student
from twostep.formats.embeddings import Embedding, bundled_embeddings, find_embeddings
from twostep.formats.lora_files import find_layer, find_parameter, merge_lora, read_lora, split_name
from twostep.formats.lora_kinds import LowRank, WeightChange
from twostep.formats.lora_locate import find_lora_file
from twostep.models.bundle import Bundle

_SPELLED = re.compile(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)))?")
"""A LoRA with its weight: "file", or "file:0.8"."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA's file, and how strongly it is applied: 1 is as it was trained."""

    checkpoint: Checkpoint
    weight: float = 1.0

    @property
    def path(self) -> Path:
        """The file."""
        return self.checkpoint.path

    @property
    def contract(self) -> Contract | None:
        """The contract that the file carries, None for a plain style."""
        return self.checkpoint.carried

    @property
    def makes_students(self) -> bool:
        """Whether it turns teachers into students of few steps."""
        return self.contract is not None and not goes_on_a_student(self.contract)

    def read(self, parts: Mapping[str, nn.Module]) -> dict[str, WeightChange]:
        """Read what it does to networks, at a weight of 1; raises LoraError if it does not fit."""
        alpha = None if self.contract is None else self.contract.lora_alpha
        return read_lora(self.checkpoint, parts, alpha=alpha)

    @property
    def embeddings(self) -> list[Embedding]:
        """The textual inversions that lie in the file with it."""
        return bundled_embeddings(self.checkpoint.file)

    def contract_on(self, model: Contract) -> Contract:
        """Return the contract of a model with this LoRA on it.

        Raises ContractError if the LoRA was made for another model.
        """
        if self.contract is None:
            return self._as_style(model)
        if not self.makes_students:
            if self.contract.base != re.split("[+:]", model.name)[0]:
                raise ContractError(
                    f"{self.path} was trained on {self.contract.base}; this is {model.name}. Load "
                    "that student."
                )
            return self._as_style(model)
        self._check_teacher(model, self.contract)
        _, plus, styles = model.name.partition("+")
        student = student_name(model.base, self.contract.steps)
        name = f"{student}{_suffix(self.weight)}{plus}{styles}"
        return replace(self.contract, name=name, base=model.base, sizes=model.sizes)

    def _as_style(self, model: Contract) -> Contract:
        """Return the contract of a model that is sampled as before, but whose name, which goes
        into every picture, names the style.
        """
        return replace(model, name=f"{model.name}+{self.path.stem}{_suffix(self.weight)}")

    def _check_teacher(self, model: Contract, contract: Contract) -> None:
        """Raise ContractError unless this LoRA can make a student of a model."""
        if model.role == "student":
            raise ContractError(
                f"{self.path} makes {contract.steps}-step students of teachers, and {model.name} "
                f"is one of {model.steps} steps already: it would be distilled twice. Load its "
                "teacher, or leave this LoRA out."
            )
        if contract.media != model.media:
            raise ContractError(
                f"{self.path} makes students that draw {contract.things}, and {model.name} makes "
                f"{model.things}. Use a LoRA that was distilled from {model.base}."
            )
        if contract.prediction_type != model.prediction_type:
            raise ContractError(
                f"{self.path} was distilled where {contract.prediction_type} is predicted; "
                f"{model.name} predicts {model.prediction_type}. Use a LoRA of such a teacher."
            )


def find_lora(lora: str | LoraFile) -> LoraFile:
    """Return a LoRA by "file" or "file:0.8", whose header is read.

    The file may be a folder or a hub repository with one LoRA in it, or a built-in name. Raises
    ModelError if there is none.
    """
    if isinstance(lora, LoraFile):
        return lora
    name, weight = _parsed(lora)
    path = find_lora_file(name)
    return LoraFile(_look_at(name, path, 0, 0), weight)


def all_embeddings(loras: Sequence[LoraFile], places: Sequence[str]) -> list[Embedding]:
    """Return the textual inversions in files and folders, and those that LoRAs bring along.

    The same name of both is that of the files. Raises EmbeddingError as `find_embeddings`.
    """
    found = {each.name: each for lora in loras for each in lora.embeddings}
    found |= {each.name: each for each in find_embeddings(places)}
    return list(found.values())


def spelled(lora: str | LoraFile) -> str:
    """Return a LoRA as "file" or "file:weight", a string as it is."""
    if isinstance(lora, str):
        return lora
    if lora.weight == 1:
        return lora.checkpoint.name
    # Without an exponent, and exact.
    return f"{lora.checkpoint.name}:{Decimal(repr(lora.weight)):f}"


def _parsed(lora: str) -> tuple[str, float]:
    """Return name and weight of a LoRA that is spelled as "file" or "file:0.8"."""
    match = _SPELLED.fullmatch(lora)
    if match is None:
        return lora, 1.0
    return match[1], float(match[2] or 1)


def _suffix(weight: float) -> str:
    return "" if weight == 1 else f":{weight:g}"


class LoraFinder:
    """Finds LoRAs, and remembers the headers of the last `num_kept` files.

    A file that was written anew is read again. May be used from any thread.
    """

    def __init__(self, num_kept: int = 32) -> None:
        self._checkpoints = lru_cache(num_kept)(_look_at)

    def find(self, lora: str | LoraFile) -> LoraFile:
        """Return a LoRA as `find_lora` does."""
        if isinstance(lora, LoraFile):
            return lora
        name, weight = _parsed(lora)
        path = find_lora_file(name)
        status = path.stat()
        checkpoint = self._checkpoints(name, path, status.st_mtime_ns, status.st_size)
        return LoraFile(checkpoint, weight)


class LoraCache:
    """One loaded model under changing stacks of LoRAs, without changing the model.

    The networks' modules are copied for each stack, but not their weights. A LoRA is computed
    beside its layer, W x + weight * alpha / rank * up down x; what is no product of two small
    matrices (a LoHa, LoKr, DoRA or full difference) changes a copy of its layer's weight. Or,
    `fused`, everything changes copies of the weights. The model itself is never written to: it
    stays as it was bit for bit, and different stacks may sample at the same time.

    Not fused, a stack takes no memory beyond its LoRAs, which stacks share, and the weights that it
    had to copy; fused, it takes that of the networks it changes, and samples as fast as the model
    alone. The last `num_kept` stacks are
    kept, so that one of them again costs no time and no look at the disk. Move the model to its
    device and precision before.
    """

    def __init__(self, bundle: Bundle, *, fused: bool = False, num_kept: int = 8) -> None:
        self.bundle = bundle
        self.fused = fused
        self._patched = lru_cache(num_kept)(self._patch)
        self._low_ranks = lru_cache(num_kept)(self._read)
        self._finder = LoraFinder()

    def apply(self, loras: Sequence[str | LoraFile], *, embeddings: Sequence[str] = ()) -> Bundle:
        """Return the model with LoRAs on it, each "file", "file:weight" or a `LoraFile`.

        `embeddings` are files and folders of textual inversions, whose names then stand for them in
        prompts; those that lie in a LoRA's file come with it. Raises as `load_with_loras`. May be
        called from any thread.
        """
        return self._patched(tuple(loras), tuple(embeddings))

    def _patch(self, loras: tuple[str | LoraFile, ...], embeddings: tuple[str, ...]) -> Bundle:
        files = [self._finder.find(lora) for lora in loras]
        contract = self.bundle.contract
        for lora in files:
            contract = lora.contract_on(contract)
        stack = [(lora.weight, self._low_ranks(lora.checkpoint)) for lora in files]
        parts = self._copied_parts({layer for _, changes in stack for layer in changes})
        if self.fused:
            for weight, changes in stack:
                merge_lora(changes, parts, weight=weight)
        else:
            _put_beside(stack, parts)
        origin = (*self.bundle.origin, *map(spelled, loras))
        patched = replace(self.bundle.with_parts(parts), contract=contract, origin=origin)
        return patched.with_embeddings(all_embeddings(files, embeddings))

    def _read(self, checkpoint: Checkpoint) -> dict[str, WeightChange]:
        """Read a LoRA to where the layers are that it changes."""
        parts = self.bundle.parts
        changes = LoraFile(checkpoint).read(parts)
        return {name: change.to(find_parameter(parts, name)) for name, change in changes.items()}

    def _copied_parts(self, layers: set[str]) -> dict[str, nn.Module]:
        """Return the model's networks, those with such layers as copies.

        Not fused, the copies share all weights and buffers with the model.
        """
        parts = dict(self.bundle.parts)
        for part in {layer.partition(".")[0] for layer in layers}:
            network = parts[part]
            shared: dict[int, Any] = {}
            if not self.fused:
                weights = chain(network.parameters(), network.buffers())
                shared = {id(weight): weight for weight in weights}
            parts[part] = copy.deepcopy(network, shared)
        return parts


def _look_at(name: str, path: Path, modified: int, size: int) -> Checkpoint:
    """Resolve a LoRA; `modified` and `size` tell a file that was written anew from the old one."""
    return replace(resolve(path), name=name)


_Stack = Sequence[tuple[float, Mapping[str, WeightChange]]]
"""LoRAs in order: the strength of each, and its changes by name."""


def _put_beside(stack: _Stack, parts: Mapping[str, nn.Module]) -> None:
    """Let the layers of networks, which share their weights, compute a stack beside themselves."""
    by_name: dict[str, list[tuple[float, WeightChange]]] = {}
    for strength, changes in stack:
        for name, change in changes.items():
            by_name.setdefault(name, []).append((strength, change))
    for name, listed in by_name.items():
        low_ranks = [change for _, change in listed if isinstance(change, LowRank)]
        if len(low_ranks) < len(listed):
            _change_copy(name, listed, parts)
            continue
        for (strength, _), low_rank in zip(listed, low_ranks, strict=True):
            scale = strength * low_rank.alpha / low_rank.rank
            find_layer(parts, name).register_forward_hook(partial(_beside, low_rank, scale))


@torch.no_grad()
def fused(network: nn.Module) -> nn.Module:
    """Return a network that computes the same without LoRAs beside its layers.

    They are merged into copies of these layers' weights; all other weights are shared. A network
    without any is returned as it is.
    """
    hooks = {
        (name, key): hook
        for name, layer in network.named_modules()
        for key, hook in layer._forward_hooks.items()
        if isinstance(hook, partial) and hook.func is _beside
    }
    if not hooks:
        return network
    weights = chain(network.parameters(), network.buffers(), hooks.values())
    shared: dict[int, Any] = {id(each): each for each in weights}
    copied = copy.deepcopy(network, shared)
    for (name, key), hook in hooks.items():
        layer: Any = copied.get_submodule(name)
        del layer._forward_hooks[key]
        low_rank, scale = hook.args
        strength = scale * low_rank.rank / low_rank.alpha
        changed = low_rank.applied(layer.weight, strength).to(layer.weight.dtype)
        layer.weight = nn.Parameter(changed, requires_grad=layer.weight.requires_grad)
    return copied


@torch.no_grad()
def _change_copy(
    name: str, listed: Sequence[tuple[float, WeightChange]], parts: Mapping[str, nn.Module]
) -> None:
    """Give a layer a weight, or a bias, of its own, with changes applied in order."""
    old = find_parameter(parts, name)
    new: Tensor = old
    for strength, change in listed:
        new = change.applied(new, strength)
    layer, kind = split_name(name)
    parameter = nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad)
    setattr(find_layer(parts, layer), kind, parameter)


def _beside(
    low_rank: LowRank, scale: float, layer: Any, inputs: tuple[Tensor], output: Tensor
) -> Tensor:
    """Return a layer's output with a LoRA's added: a forward hook."""
    x = inputs[0]
    if isinstance(layer, nn.Linear):
        return output + linear(scale * linear(x, low_rank.down), low_rank.up)
    inner = conv2d(x, low_rank.down, None, layer.stride, layer.padding, layer.dilation)
    return output + conv2d(scale * inner, low_rank.up)
