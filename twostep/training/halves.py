"""Weights in 16 bits, as the files of models hold them."""

from collections.abc import Mapping

from torch import Tensor


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in float16, on the CPU, each in the usual layout of memory.

    What is no fraction stays as it is, such as the number of batches that a norm has seen.
    """
    return {name: _half(value).cpu().contiguous() for name, value in weights.items()}


def _half(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value
