"""What tells tensors apart, one model's weights or one batch from any other, and their size."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def digest_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return 32 hex digits that depend on every name and every byte, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    # numpy knows no bfloat16; as bytes it does not matter what they mean. They are not copied.
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def num_weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's weights."""
    return sum(weight.nbytes for weight in network.parameters())
