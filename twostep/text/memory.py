"""What text encoders made of prompts, and tokenizers found in them, kept for the next time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor

MAX_BYTES = 2**26
"""What is kept for one stack of text encoders: about a hundred prompts of SDXL in float32."""


MAX_FINDINGS = 4096
"""What is kept of what was found in prompts; each takes little more than its prompt."""

_Finding = TypeVar("_Finding")


class PromptMemory:
    """The embeddings of the prompts that were encoded last, and what was found in prompts.

    It belongs to text encoders whose weights do not change. What it returns is shared: nobody may
    write to it. May be used from any thread.

    Args:
        max_bytes: of all embeddings together; what was used longest ago leaves first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._known: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
        self._num_bytes = 0
        self._findings: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        """Return how many embeddings are kept."""
        return len(self._known)

    def found(self, key: Hashable, find: Callable[[], _Finding]) -> _Finding:
        """Return what is kept of a prompt, or else what `find` returns, which is then kept."""
        with self._lock:
            if key in self._findings:
                kept: _Finding = self._findings[key]
                return kept
        finding = find()
        with self._lock:
            self._findings[key] = finding
            if len(self._findings) > MAX_FINDINGS:
                self._findings.popitem(last=False)
        return finding

    def recall(
        self, key: Hashable, encode: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return what is kept for a key, or else what `encode` returns, which is then kept."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        encoded = encode()
        with self._lock:
            if key not in self._known and _num_bytes(encoded) <= self._max_bytes:
                self._known[key] = encoded
                self._num_bytes += _num_bytes(encoded)
            while self._num_bytes > self._max_bytes:
                _, left = self._known.popitem(last=False)
                self._num_bytes -= _num_bytes(left)
        return encoded


def _num_bytes(encoded: tuple[Tensor, Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in encoded)
