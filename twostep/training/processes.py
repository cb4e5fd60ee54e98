"""Several processes, one device each, that train as one.

All have the same weights; of every batch each takes a share. Every process draws the randomness of
the whole batch and keeps its share of it, so the number of processes changes figures by rounding
only.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import distributed


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
        _group_of_hosts.cache_clear()
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


def averaged(figures: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the means of figures over all processes, of several iterations in one message.

    All processes must give as many, with the same names. No accelerator is waited for.
    """
    if world().size == 1 or not any(figures):
        return [dict(each) for each in figures]
    own = torch.tensor([value for each in figures for value in each.values()], dtype=torch.float64)
    distributed.all_reduce(own, group=_group_of_hosts())
    means = iter((own / world().size).tolist())
    return [{name: next(means) for name in each} for each in figures]


def largest(numbers: Sequence[float]) -> list[float]:
    """Return the largest of each number that any process has. No accelerator is waited for."""
    if world().size == 1:
        return list(numbers)
    own = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(own, distributed.ReduceOp.MAX, group=_group_of_hosts())
    found: list[float] = own.tolist()
    return found


@cache
def _group_of_hosts() -> distributed.ProcessGroup | None:
    """Return the group in which processes tell each other what they have in main memory.

    The first call founds it, which all processes must do together. None is that of all tensors.
    """
    return None if device_type() == "cpu" else distributed.new_group(backend="gloo")
