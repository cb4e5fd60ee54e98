"""Pieces of pictures, the loss on their edges, and how near they are to others."""

import torch
from jaxtyping import Float
from torch import Tensor


def random_crop(
    pictures: Float[Tensor, "count c h w"], side: int, generator: torch.Generator
) -> Float[Tensor, "count c side side"]:
    """Cut the same random square out of every picture, or out of latents."""
    top, left = (
        int(torch.randint(size - side + 1, (1,), generator=generator))
        for size in pictures.shape[-2:]
    )
    return pictures[:, :, top : top + side, left : left + side]


def edge_loss(difference: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, ""]:
    """Return the L1 of the differences of neighbouring pixels: an error of sharpness."""
    horizontal = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return horizontal + vertical


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Return how near pictures in -1..1 are to others, as a peak signal-to-noise ratio in dB."""
    error = (pictures - others).float().square().mean()
    return 10 * torch.log10(4 / error)
