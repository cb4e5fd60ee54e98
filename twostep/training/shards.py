"""Sharded networks, of whose every weight each process holds a part, and their checkpoints.

FSDP (arXiv 2304.11277) gathers the weights of a block while it computes, and averages gradients
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
    """Keep this process's part of every weight, in place; all processes must call it.

    The modules that the network lists in `_no_split_modules` are gathered one by one while they
    compute. What lies outside of them is gathered when the network is called.

    Args:
        network: what is sharded.
        methods: names of methods of the network that gather like a call of it.
    """
    mesh = _mesh()
    block_names = {
        name
        for module in network.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    # From the inside out, because a module takes the weights that no inner one has taken.
    for module in reversed(list(network.modules())):
        if module is network or type(module).__name__ in block_names:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(network, method)


def gathered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole weights on the CPU in the first process, which writes, and none in the others.

    All processes must call it, because each sends its parts.
    """
    result = {}
    for key, value in weights.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if world().is_first:
            result[key] = whole.cpu()
    return result


def exchange_shards(state: dict[str, Any], folder: Path, *, write: bool) -> dict[str, Any]:
    """Write the shards in a state to a folder, or read them back into it; all processes must call.

    Args:
        state: nested dictionaries with tensors.
        folder: where shards are kept, each process's own; not touched if the state has none.
        write: whether to write or to read.

    Returns:
        When writing, the state with empty tensors in place of the shards. When reading, `state` is
        such a one, and comes back with its shards, spread over as many processes as there are now.
    """
    shards: dict[str, Tensor] = {}
    exchanged: dict[str, Any] = _exchanged(state, shards, cache(_mesh))
    try:
        if shards and write:
            save(shards, checkpoint_id=folder)
        elif shards:
            load(shards, checkpoint_id=folder)
    except CheckpointException as error:
        # What went wrong in one process is raised in all, as if it were their own.
        raise next(iter(error.failures.values()))[0] from error
    return exchanged


def has_shards(state: Any) -> bool:
    """Return whether a state, or one that was written of it, has shards in it."""
    if isinstance(state, dict):
        return any(map(has_shards, state.values()))
    return isinstance(state, DTensor) or (isinstance(state, Tensor) and state.is_meta)


def _mesh() -> DeviceMesh:
    """Return all processes in a row.

    The first call founds a group of them, which all processes must do together.
    """
    return init_device_mesh(device_type(), (world().size,))


def _exchanged(
    value: Any, shards: dict[str, Tensor], mesh: Callable[[], DeviceMesh], path: str = ""
) -> Any:
    """Swap shards for empty tensors and empty tensors for shards; the shards go into `shards`."""
    if isinstance(value, dict):
        return {key: _exchanged(part, shards, mesh, f"{path}/{key}") for key, part in value.items()}
    if isinstance(value, DTensor):
        shards[path] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, Tensor) and value.is_meta:
        shards[path] = zeros(
            value.shape,
            dtype=value.dtype,
            device_mesh=mesh(),
            placements=[Shard(0)],
        )
        return shards[path]
    return value
