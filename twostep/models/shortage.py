"""Memory that is not there: how libraries say so, and the error that a person gets."""

from __future__ import annotations

import torch

from twostep.errors import TwostepError

_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate",
    "bad_alloc",
)
"""What torch, OpenVINO and ONNX Runtime say, in small letters."""


class MemoryShortageError(TwostepError):
    """There is less memory than a drawing takes."""


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)
