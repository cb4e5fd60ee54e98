"""The autoencoder of a built-in model, trained on crops of composed pictures.

The loss is L1 on pixels and on differences of neighbouring pixels. Convolutions learn from crops as
much as from whole pictures, and a crop of half the side costs a quarter. A penalty on the moments
of the latents holds them at zero mean and unit variance, and they are jittered a little before they
are decoded, so that small errors of a denoiser stay small in the picture.
"""

from typing import Literal

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep.media.image import ImageCodec
from twostep.media.patches import edge_loss, random_crop
from twostep.pretrain.drawings import DrawingSet, Placement, compose, random_backgrounds
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.model import build_vae
from twostep.pretrain.sizes import find_size
from twostep.training.device import find_device
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder


class VaeSettings(PartSettings):
    """The recipe of an autoencoder."""

    part: Literal["vae"] = "vae"
    num_pictures: int = Field(8192, gt=0, description="composed pictures that crops are cut from")
    crop_pixels: int = Field(32, ge=16, description="side of the crops; a multiple of 4")
    edge_weight: float = Field(
        0.5, ge=0, description="weight of the L1 on differences of neighbouring pixels"
    )
    moment_weight: float = Field(
        0.1, ge=0, description="weight of the penalty that holds latents at N(0, 1)'s moments"
    )
    jitter: float = Field(
        0.05, ge=0, description="deviation of the noise added to latents before decoding"
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )


def train_vae(
    drawings: DrawingSet,
    settings: VaeSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
) -> ImageCodec:
    """Train an autoencoder on composed pictures; return it with its averaged weights."""
    size = find_size(settings.size)
    device = find_device(settings.device)
    torch.manual_seed(settings.loop.seed)
    vae = build_vae(size).to(device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(vae)
    vae.train()
    first = Randomness.at(settings.loop.seed, -1)
    pictures = random_pictures(drawings, settings.num_pictures, size.pixels, first.tensors)

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        batch_size = settings.loop.batch_size
        share = world().share(batch_size)
        rows = torch.randint(len(pictures), (batch_size,), generator=generator)
        crops = random_crop(pictures[rows], settings.crop_pixels, generator)[share]
        crops = crops.to(device, memory_format=torch.channels_last)
        latents: Tensor = vae.encode(crops).latents.float()
        noise = torch.randn((batch_size, *latents.shape[1:]), generator=generator)[share]
        noisy = latents + settings.jitter * noise.to(device)
        difference: Tensor = vae.decode(noisy).sample.float() - crops
        edges = edge_loss(difference)
        moments = moment_loss(latents)
        penalties: Tensor = settings.edge_weight * edges + settings.moment_weight * moments
        return difference.abs().mean() + penalties

    train_network(vae, loss, settings.loop, folder, name="vae", on_iteration=on_iteration)
    return ImageCodec(vae.to(memory_format=torch.contiguous_format).eval())


def random_pictures(
    drawings: DrawingSet, count: int, pixels: int, generator: torch.Generator
) -> Float[Tensor, "count 3 pixels pixels"]:
    """Compose `count` random drawings on random backgrounds."""
    flat = drawings.drawings.flatten(0, 1)
    rows = torch.randint(len(flat), (count,), generator=generator)
    background = random_backgrounds(count, generator)
    # In parts, for drawings are larger than the pictures that they become.
    parts = zip(rows.split(256), background.split(256), strict=True)
    pictures = [
        compose(flat[chosen], behind, Placement(), generator, pixels=pixels)
        for chosen, behind in parts
    ]
    return torch.cat(pictures)


def moment_loss(latents: Float[Tensor, "batch c h w"]) -> Float[Tensor, ""]:
    """Return how far mean and deviation of every channel are from 0 and 1.

    Of several processes each looks at its own share, so this term differs a little with their
    number.
    """
    mean = latents.mean(dim=(0, 2, 3))
    deviation = latents.std(dim=(0, 2, 3))
    return (mean**2 + (deviation - 1) ** 2).mean()


def _checkpoint_gradients(vae: AutoencoderTiny) -> None:
    """Recompute the layers of encoder and decoder in the backward pass.

    diffusers' own way leaves out the encoder's step from -1..1 to 0..1.
    """

    def recomputed(layers: nn.Module, x: Tensor) -> Tensor:
        inputs = x.add(1).div(2) if layers is vae.encoder.layers else x
        output: Tensor = checkpoint(layers, inputs, use_reentrant=False)
        return output

    vae.enable_gradient_checkpointing(recomputed)
