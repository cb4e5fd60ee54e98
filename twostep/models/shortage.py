"""Memory that is not there: how libraries say so, and the error that a person gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

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

_Computed = TypeVar("_Computed")


class MemoryShortageError(TwostepError):
    """There is less memory than a drawing takes."""


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | MemoryShortageError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _WORDS)


def if_it_fits(compute: Callable[[], _Computed]) -> _Computed | None:
    """Return what is computed; None where memory runs out. Other errors are raised."""
    try:
        return compute()
    except Exception as error:
        if not is_shortage(error):
            raise
    # Here the error is gone, and with it the memory of what raised it.
    return None
