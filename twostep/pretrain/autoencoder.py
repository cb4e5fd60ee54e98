"""The nano autoencoder: L1 on pixels and on their differences, a small KL term; crops first, whole pictures last.

Convolutions learn as much from a crop of half the side, at a quarter of the cost; the last part of training sees
whole pictures, since group norms have other statistics there. At the end the latents are scaled to unit variance.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from twostep.data.captions import BACKGROUNDS
from twostep.data.emoji import EmojiSet, Placement, compose
from twostep.models.nano import PIXELS, build_vae
from twostep.pretrain.loop import Draw, LoopSettings, OnIteration, train
from twostep.runs.folder import RunFolder
from twostep.runs.recipe import Settings


class VaeSettings(Settings):
    """The recipe part of the autoencoder."""

    loop: LoopSettings
    crop_pixels: int = Field(32, ge=16, le=PIXELS, description="side of the crops; a multiple of 8")
    whole_from: float = Field(0.75, ge=0, le=1, description="share of the iterations after which pictures are whole")
    kl_weight: float = Field(1e-4, ge=0, description="weight of the KL term, per latent element")
    edge_weight: float = Field(0.5, ge=0, description="weight of the L1 on differences of neighbouring pixels")


def train_vae(
    emoji: EmojiSet,
    settings: VaeSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = lambda iteration, loss: None,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> AutoencoderKL:
    """Train the autoencoder on composited drawings; returns it with latents of unit variance."""
    torch.manual_seed(settings.loop.seed)
    vae = build_vae()

    def loss(iteration: int, draw: Draw) -> Tensor:
        whole = iteration >= settings.whole_from * settings.loop.iterations
        side = PIXELS if whole else settings.crop_pixels
        count = settings.loop.batch_size if not whole else max(1, settings.loop.batch_size // 4)
        pictures = random_crop(random_pictures(emoji, count, draw), side, draw)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draw.tensors)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        pixels = (decoded - pictures).abs().mean()
        return pixels + settings.edge_weight * _edges(decoded - pictures) + settings.kl_weight * divergence

    train(vae, loss, settings.loop, folder=folder, name="vae", on_iteration=on_iteration, on_checkpoint=on_checkpoint)
    vae.eval()
    scale_latents(vae, random_pictures(emoji, 512, Draw.at(settings.loop.seed, settings.loop.iterations)))
    return vae


def random_pictures(emoji: EmojiSet, count: int, draw: Draw) -> Float[Tensor, "count 3 64 64"]:
    """Composite `count` random drawings on random backgrounds."""
    drawings = emoji.drawings.flatten(0, 1)
    chosen = torch.randint(len(drawings), (count,), generator=draw.tensors)
    background = torch.randint(len(BACKGROUNDS), (count,), generator=draw.tensors)
    return compose(drawings[chosen], background, Placement(), draw.tensors)


def random_crop(pictures: Float[Tensor, "count 3 h w"], side: int, draw: Draw) -> Float[Tensor, "count 3 side side"]:
    """Cut the same random square out of every picture."""
    top, left = torch.randint(pictures.shape[-1] - side + 1, (2,), generator=draw.tensors).tolist()
    return pictures[:, :, top : top + side, left : left + side]


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, pictures: Float[Tensor, "count 3 64 64"]) -> None:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions beside it: latents become N(0, 1)-like.

    So the scaling factor is 1, and any SDXL pipeline decodes without knowing of it.
    """
    means = torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures.split(64)])
    mean, deviation = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(dim=1)
    decode.weight *= deviation[None, :, None, None]
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2 * deviation.log()


def _edges(difference: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, ""]:
    horizontal = (difference[..., 1:] - difference[..., :-1]).abs().mean()
    vertical = (difference[..., 1:, :] - difference[..., :-1, :]).abs().mean()
    return horizontal + vertical
