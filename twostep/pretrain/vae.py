"""The nano autoencoder: L1 on pixels and on their differences; crops, because convolutions learn as
much from them.

A crop of half the side costs a quarter. Latents are held at zero mean and unit variance by a
penalty on their moments, and jittered a little while the decoder learns, so that small errors of a
denoiser stay small in the picture.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.media.image import ImageCodec
from twostep.pretrain.descent import DescentSettings, silent, train
from twostep.pretrain.drawings import EmojiSet, Placement, compose
from twostep.pretrain.model import PIXELS, build_vae
from twostep.training.loop import OnIteration, Randomness
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder


class VaeSettings(Settings):
    """The recipe part of the autoencoder."""

    loop: DescentSettings
    num_pictures: int = Field(8192, gt=0, description="composited drawings that crops are cut from")
    crop_pixels: int = Field(32, ge=16, le=PIXELS, description="side of the crops; a multiple of 4")
    edge_weight: float = Field(
        0.5, ge=0, description="weight of the L1 on differences of neighbouring pixels"
    )
    moment_weight: float = Field(
        0.1, ge=0, description="weight of the penalty that holds latents at N(0, 1)'s moments"
    )
    jitter: float = Field(
        0.05, ge=0, description="deviation of the noise added to latents before decoding"
    )


def train_vae(
    emoji: EmojiSet, settings: VaeSettings, folder: RunFolder, *, on_iteration: OnIteration = silent
) -> ImageCodec:
    """Train the autoencoder on composited drawings; returns it with its averaged weights."""
    torch.manual_seed(settings.loop.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    pictures = random_pictures(emoji, settings.num_pictures, Randomness.at(settings.loop.seed, -1))

    def loss(iteration: int, draw: Randomness) -> Tensor:
        chosen = torch.randint(len(pictures), (settings.loop.batch_size,), generator=draw.tensors)
        crops = random_crop(pictures[chosen], settings.crop_pixels, draw).contiguous(
            memory_format=torch.channels_last
        )
        latents: Tensor = vae.encode(crops).latents.float()
        noise = torch.randn(latents.shape, generator=draw.tensors)
        off: Tensor = vae.decode(latents + settings.jitter * noise).sample.float() - crops
        mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        moments: Tensor = (mean**2 + (deviation - 1) ** 2).mean()
        penalties: Tensor = settings.edge_weight * _edges(off) + settings.moment_weight * moments
        return off.abs().mean() + penalties

    train(vae, loss, settings.loop, folder, "vae", on_iteration=on_iteration)
    return ImageCodec(vae.to(memory_format=torch.contiguous_format).eval())


def random_pictures(
    emoji: EmojiSet, count: int, draw: Randomness
) -> Float[Tensor, "count 3 height width"]:
    """Composite `count` random drawings on random backgrounds."""
    drawings = emoji.drawings.flatten(0, 1)
    chosen = torch.randint(len(drawings), (count,), generator=draw.tensors)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=draw.tensors)
    parts = zip(chosen.split(256), background.split(256), strict=True)
    return torch.cat(
        [compose(drawings[rows], behind, Placement(), draw.tensors) for rows, behind in parts]
    )


def random_crop(
    pictures: Float[Tensor, "count 3 h w"], side: int, draw: Randomness
) -> Float[Tensor, "count 3 side side"]:
    """Cut the same random square out of every picture."""
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2,), generator=draw.tensors).tolist()
    return pictures[:, :, top : top + side, left : left + side]


def _edges(difference: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, ""]:
    horizontal = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return horizontal + vertical
