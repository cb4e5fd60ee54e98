"""Several processes, one device each, that train as one.

All have the same weights; of every batch each takes a share. Every process draws the randomness of
the whole batch and keeps its share of it, so the number of processes changes figures by rounding
only.
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
    """Which of how many processes this is; a process that is alone is the first of one."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, batch_size: int) -> slice:
        """Return which items of a batch of all processes are this one's."""
        size = batch_size // self.size
        return slice(self.rank * size, (self.rank + 1) * size)


def world() -> World:
    """Return the rank of this process and the number of those that were joined."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join all processes that `accelerate launch` or torchrun started, for the block.

    A process that was started alone stays alone.

    Args:
        device: what is trained on, which decides how tensors are exchanged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type not in ("cuda", "xpu"))
    yield world()
    if world().size > 1:
        distributed.destroy_process_group()


def device_type() -> str:
    """Return where joined processes exchange tensors: "cpu", or the type of the accelerator."""
    if distributed.get_backend() == "gloo":
        return "cpu"
    return str(torch.accelerator.current_accelerator())


def wait() -> None:
    """Wait until every process is here."""
    if world().size > 1:
        distributed.barrier()


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all processes, in place and in one message.

    Shards are left as they are: FSDP has averaged them already.
    """
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    if world().size == 1 or not whole:
        return
    flat = torch.cat([tensor.flatten() for tensor in whole])
    distributed.all_reduce(flat)
    flat /= world().size
    means = flat.split([tensor.numel() for tensor in whole])
    for tensor, mean in zip(whole, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def averaged(figures: dict[str, float]) -> dict[str, float]:
    """Return the means of figures over all processes, which must all have the same names."""
    if world().size == 1:
        return figures
    means = torch.tensor(list(figures.values()), dtype=torch.float64, device=device_type())
    average([means])
    return dict(zip(figures, means.tolist(), strict=True))
