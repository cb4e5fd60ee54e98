"""Shards: networks whose every weight is spread over all processes, and how checkpoints keep them.

FSDP (arXiv 2304.11277): a block's weights are gathered while it computes; gradients come averaged
over the processes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, load, save  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, zeros

from twostep.training.processes import device_type, world


def shard(network: nn.Module, methods: Sequence[str] = ()) -> None:
    """Leave this process its share of every weight, in place; all processes must call it.

    Gathered at once are the modules that the network names as not to be split, and, when it or one
    of these methods of it is called, what is outside of them.
    """
    mesh = _mesh()
    blocks = {
        name
        for module in network.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    for module in reversed(list(network.modules())):
        if module is network or type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(network, method)


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole weights on the CPU to the first process, which writes, and none to the others;
    all must ask.
    """
    tensors = (
        (key, value.full_tensor() if isinstance(value, DTensor) else value)
        for key, value in weights.items()
    )
    return {key: tensor.cpu() for key, tensor in tensors if world().is_first}


def exchange_shards(state: dict[str, Any], folder: Path, *, write: bool) -> dict[str, Any]:
    """Write the shards in a state, every process its own, and return it with empty tensors in their
    places; or read.

    Then the state is such a one, and comes back whole, on as many processes as there are now.
    """
    shards: dict[str, Tensor] = {}
    exchanged: dict[str, Any] = _exchanged(state, shards, cache(_mesh))
    try:
        if shards:
            (save if write else load)(shards, checkpoint_id=folder)
    except CheckpointException as error:
        # What went wrong in one process is raised in all, as if it were their own.
        raise next(iter(error.failures.values()))[0] from error
    return exchanged


def _mesh() -> DeviceMesh:
    """Return all processes in a row; making it may found a group of them, which all must do
    together.
    """
    return init_device_mesh(device_type(), (world().size,))


def _exchanged(
    value: Any, shards: dict[str, Tensor], mesh: Callable[[], DeviceMesh], path: str = ""
) -> Any:
    """Return a state with empty tensors for shards, or with shards for empty tensors, and put those
    into `shards`.
    """
    if isinstance(value, dict):
        return {key: _exchanged(part, shards, mesh, f"{path}/{key}") for key, part in value.items()}
    if isinstance(value, DTensor):
        shards[path] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Tensor) and value.is_meta:
        value = shards[path] = zeros(
            value.shape, dtype=value.dtype, device_mesh=mesh(), placements=[Shard(0)]
        )
    return value
