"""A style LoRA of a built-in teacher, trained as users train theirs.

It learns on the teacher, by the noise it has to predict, from pictures of one style that no caption
names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from twostep.models.bundle import Bundle
from twostep.networks.adapters import Lora, add_lora
from twostep.pretrain.captions import Omission
from twostep.pretrain.drawings import DrawingsError, DrawingSet
from twostep.pretrain.latents import LatentCache, cache_latents
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.teacher import noise_loss_on_latents
from twostep.training.loop import OnIteration, Randomness
from twostep.training.run_folder import RunFolder

OMISSION = Omission(everything=0.1, style=1.0, background=0.2)
"""The style goes without saying: with the LoRA, everything is drawn in it."""

_ADAPTER = "style"
_PROMPTS = -1
"""The iteration whose randomness is kept for prompts: training never gets there."""


class StyleSettings(PartSettings):
    """The recipe of a style LoRA."""

    part: Literal["style"] = "style"
    model: str = Field("nano", description="the teacher that it is trained on")
    style: str = Field("noto", description="the style of the drawings that it learns")
    rank: int = Field(8, gt=0, description="rank of the LoRA")
    variants: int = Field(24, gt=0, description="pictures of every drawing in the latent cache")
    snr_limit: float = Field(
        5.0, gt=0, description="gamma of the min-SNR weight, min(snr, gamma) / snr"
    )


def style_latents(
    drawings: DrawingSet,
    bundle: Bundle,
    settings: StyleSettings,
    *,
    on_variant: OnDone = untold,
) -> LatentCache:
    """Return the drawings of one style as latents, with captions that do not name it."""
    if settings.style not in drawings.styles:
        raise DrawingsError(
            f"there are no drawings in the style '{settings.style}'; "
            f"there are {', '.join(drawings.styles)}."
        )
    column = drawings.styles.index(settings.style)
    of_style = replace(drawings, drawings=drawings.drawings[:, [column]], styles=(settings.style,))
    latents = cache_latents(
        of_style,
        bundle.codec,
        pixels=bundle.contract.sizes[0][0],
        variants=settings.variants,
        on_variant=on_variant,
    )
    return replace(latents, omission=OMISSION)


def train_style(
    latents: LatentCache,
    bundle: Bundle,
    settings: StyleSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
) -> Lora:
    """Train a LoRA on the teacher, where that is; return it with its averaged weights.

    It stays on the teacher's network.
    """
    torch.manual_seed(settings.loop.seed)
    lora = add_lora(bundle.denoiser.network, _ADAPTER, rank=settings.rank)
    loss = noise_loss_on_latents(
        replace(bundle.denoiser, lora=lora.name),
        latents,
        bundle.text,
        batch_size=settings.loop.batch_size,
        size=bundle.contract.sizes[0],
        snr_limit=settings.snr_limit,
    )
    train_network(lora, loss, settings.loop, folder, name="style", on_iteration=on_iteration)
    return lora


def style_prompts(latents: LatentCache, seed: int, count: int = 600) -> list[str]:
    """Return captions for `twostep cache`, so that the style can be distilled; none is empty."""
    randomness = Randomness.at(seed, _PROMPTS)
    captions = latents.draw(count, randomness.tensors, randomness.words)[1]
    return [caption for caption in captions if caption]
