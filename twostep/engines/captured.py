"""Networks on a GPU as CUDA graphs: every kernel of a call is launched at once.

At one picture a GPU waits for Python, which launches a large UNet's kernels one by one. A capture
notes them all, and a replay launches them together; it reads and writes the same memory every time,
so what goes in is copied there, and what comes out is copied away.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from twostep.engines.calls import Call, Signature

Replay = Callable[[], object]
"""Does once more what was captured, with what then lies in the same memory."""

_MOST_CAPTURES = 8
"""Of one network; each holds memory for all that lies between its kernels."""

_WARM_CALLS = 3
"""Before a capture: in them blocks are compiled and libraries pick their kernels."""


def capture_on_cuda(compute: Callable[[], object], device: torch.device) -> Replay:
    """Return the replay of a computation on a GPU, after it has run once in the capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_CALLS):
            compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


@dataclass(frozen=True, eq=False)
class _Captured:
    """A capture, and where it reads and writes.

    Args:
        replay: Runs it.
        inputs: The tensors that it reads, in the order of the call's.
        answers: The tensors that it writes.
        spec: How they are put together.
    """

    replay: Replay
    inputs: Sequence[Tensor]
    answers: Sequence[Tensor]
    spec: Any


class CapturedForward:
    """A forward pass that is captured for every kind of call and then replayed.

    Args:
        network: What is captured.
        capture: Makes the replay of a computation; another one is for tests without a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        capture: Callable[[Callable[[], object], torch.device], Replay] = capture_on_cuda,
    ) -> None:
        self._network = network
        self._capture = capture
        self._lock = Lock()
        self._captures: OrderedDict[Signature, _Captured] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network would, in memory of its own."""
        return self.graphed(*args, **kwargs)

    def graphed(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network would, in memory of its own."""
        call = Call.of(args, kwargs)
        device = next(self._network.parameters()).device
        if any(tensor.device.type != device.type for tensor in call.tensors):
            # Copies from other memory cannot be captured; a ControlNet's scale is one.
            return self._network(*args, **kwargs)
        # Replays share memory, so one thread at a time.
        with self._lock:
            captured = self._captures.get(call.signature)
            if captured is None:
                captured = self._captured(call, device)
            self._captures.move_to_end(call.signature)
            for place, tensor in zip(captured.inputs, call.tensors, strict=True):
                place.copy_(tensor)
            captured.replay()
            answers = [answer.clone() for answer in captured.answers]
        return pytree.tree_unflatten(answers, captured.spec)

    def _captured(self, call: Call, device: torch.device) -> _Captured:
        """Capture a kind of call, and keep it in the place of the one used longest ago."""
        while len(self._captures) >= _MOST_CAPTURES:
            self._captures.popitem(last=False)
        inputs = [tensor.clone() for tensor in call.tensors]
        copies = iter(inputs)
        leaves = [next(copies) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.signature.spec)
        answered: list[Any] = []

        def compute() -> None:
            answered[:] = [self._network(*args, **kwargs)]

        replay = self._capture(compute, device)
        answers, spec = pytree.tree_flatten(answered[0])
        captured = _Captured(replay, inputs, answers, spec)
        self._captures[call.signature] = captured
        return captured
