"""Sheets of pictures that show how far a part is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.files import write_atomically
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.sampling import (
    draw_noise,
    encode_prompts,
    pictures_of,
    sample_latents,
    sampling_times,
)

_AT_ONCE = 16
"""Pictures that are drawn together."""


def write_sheet(rows: Float[Tensor, "rows columns 3 height width"], path: Path) -> None:
    """Write pictures in -1..1 side by side and below each other, as a PNG."""
    as_one = rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    (sheet,) = to_images(as_one[None])
    with write_atomically(path) as file:
        sheet.save(file, format="PNG")


@torch.no_grad()
def draw_samples(
    bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int]
) -> Float[Tensor, "seeds prompts 3 height width"]:
    """Draw every prompt from every seed, as the model's contract says; return them on the CPU.

    Of media that are no pictures, it is what their codec previews.
    """
    size = bundle.contract.sizes[0]
    denoiser = bundle.denoiser
    times = sampling_times(bundle.contract, denoiser.schedule)
    all_seeds = [seed for seed in seeds for _ in prompts]
    guided = encode_prompts(bundle, [*prompts] * len(seeds), size)
    drawn = []
    for start in range(0, len(all_seeds), _AT_ONCE):
        some = all_seeds[start : start + _AT_ONCE]
        noise = draw_noise(some, bundle.latent_shape(*size), denoiser.device)
        part = guided[start : start + _AT_ONCE]
        latents = sample_latents(
            denoiser, part, noise, times, some, sampler=bundle.contract.sampler
        )
        drawn.append(pictures_of(bundle, latents, at_once=_AT_ONCE).float().cpu())
    whole: Tensor = torch.cat(drawn).unflatten(0, (len(seeds), len(prompts)))
    return whole
