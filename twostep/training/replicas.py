"""Gradients of several processes, which are averaged while the backward pass still computes.

torch's DistributedDataParallel (arXiv 2006.15704) sends them in buckets, each as soon as it is
full, and gradients are views of the buckets, so nothing is in memory twice. What is sharded is left
alone: FSDP averages it by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twostep.training.optimiser import Trainable
from twostep.training.processes import world


class Replica:
    """One process's replica of something trainable that all of them train as one."""

    def __init__(self, trainable: Trainable) -> None:
        """Take the first process's weights, which all others have already.

        All processes must make the same replicas in the same order.

        Args:
            trainable: whose parameters keep their places for as long as the replica lives.
        """
        self._parallel: DistributedDataParallel | None = None
        parameters = [each for each in trainable.parameters() if each.requires_grad]
        is_sharded = any(isinstance(each, DTensor) for each in parameters)
        if world().size > 1 and parameters and not is_sharded:
            self._parallel = DistributedDataParallel(
                _Computing(parameters),
                # Not every loss reaches every weight.
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )

    def loss(self, compute: Callable[[], Tensor], *, is_last: bool = True) -> Tensor:
        """Return a loss whose backward pass averages gradients over all processes.

        Every process must call it, and go back from what it returned before it is called again.

        Args:
            compute: returns the scalar, of this process's share of the batch.
            is_last: False where gradients are added up with those of further losses, the last of
                which averages the sums.
        """
        if self._parallel is None:
            return compute()
        with nullcontext() if is_last else self._parallel.no_sync():
            loss: Tensor = self._parallel(compute)
        return loss


class _Computing(nn.Module):
    """Parameters, and a call that computes whatever it is given."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.parameters_in_order = nn.ParameterList(parameters)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()
