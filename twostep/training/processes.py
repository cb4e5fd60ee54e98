"""Several processes, one device each, that train as one: the same weights everywhere, of every
batch a share.

Everybody draws the whole batch's randomness and keeps a share, so how many there are changes
figures by rounding only.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    """Which of how many processes this is; a run of one process is the first of one."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return which items of a batch are this process's."""
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)


def world() -> World:
    """Return the rank of this process and how many were joined."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Within it this process is one of all that `accelerate launch` or torchrun started; alone it
    stays alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type not in ("cuda", "xpu"))
    yield world()
    if world().size > 1:
        distributed.destroy_process_group()


def device_type() -> str:
    """Return where joined processes exchange tensors: "cpu", or the accelerator."""
    return (
        "cpu"
        if distributed.get_backend() == "gloo"
        else str(torch.accelerator.current_accelerator())
    )


def wait() -> None:
    """Wait until every process is here."""
    if world().size > 1:
        distributed.barrier()


def average(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes into tensors, in place and in one message; shards have it
    already.
    """
    tensors = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world().size == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world().size
    for tensor, mean in zip(
        tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
    ):
        tensor.copy_(mean.view_as(tensor))


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Return the means of figures over all processes."""
    if world().size == 1:
        return figures
    means = torch.tensor(list(figures.values()), dtype=torch.float64, device=device_type())
    average([means])
    return dict(zip(figures, means.tolist(), strict=True))
