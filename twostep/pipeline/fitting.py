"""What fits into memory where a drawing did not: found out by trying, on what is smaller."""

from __future__ import annotations

import torch

from twostep.contract import ContractError
from twostep.models.bundle import Bundle
from twostep.models.sampling import decode, draw_noise
from twostep.models.shortage import MemoryShortageError, if_it_fits

_LEAST_SIDE = 64
"""Smaller pictures are not tried."""


def shortage(bundle: Bundle, size: tuple[int, int], count: int) -> MemoryShortageError:
    """Return the error for pictures that do not fit into memory, with what does.

    Args:
        bundle: What they were drawn with.
        size: Their (width, height) in pixels.
        count: How many were drawn at once.
    """
    width, height = size
    wanted = f"{count} pictures of {width}x{height}" if count > 1 else f"{width}x{height} pixels"
    for tried in _smaller(bundle, size, count):
        if _fits(bundle, tried):
            fitting = "{}x{}".format(*tried)
            advice = f"one of {fitting} at a time fits" if tried == size else f"{fitting} fits"
            break
    else:
        advice = "nothing smaller fits either: use a smaller model, or free some"
    return MemoryShortageError(f"there is not enough memory for {wanted}; {advice}.")


def _smaller(bundle: Bundle, size: tuple[int, int], count: int) -> list[tuple[int, int]]:
    """Return the sizes to try, the largest first: the same one by one, and halves of it."""
    sizes = [size] if count > 1 else []
    width, height = size
    while min(width, height) >= 2 * _LEAST_SIDE:
        width, height = width // 2, height // 2
        try:
            bundle.contract.check(None, None, width, height)
        except ContractError:
            continue
        sizes.append((width, height))
    return sizes


def _fits(bundle: Bundle, size: tuple[int, int]) -> bool:
    """Call the denoiser and decode once for one picture of this size."""
    denoiser = bundle.denoiser
    noise = draw_noise([0], bundle.latent_shape(*size), denoiser.device)

    def draw() -> torch.Tensor:
        conditioning = bundle.conditioning([""], *size)
        top = torch.tensor([denoiser.schedule.top])
        return decode(bundle, denoiser(noise, top, conditioning).x0)

    return if_it_fits(draw) is not None
