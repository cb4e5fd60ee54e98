"""The autoencoder of a built-in model, trained on crops of composed pictures.

The loss is L1 on pixels and on differences of neighbouring pixels. Convolutions learn from crops as
much as from whole pictures, and a crop of half the side costs a quarter. A penalty on the moments
of the latents holds them at zero mean and unit variance, and they are jittered a little before they
are decoded, so that small errors of a denoiser stay small in the picture.

Nano's crops are cut from a pool of pictures that was composed before; mini's scenes are composed
anew for every batch, where the autoencoder trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import sent
from twostep.formats.single_file import PARTS, FolderFiles
from twostep.media.image import ImageCodec
from twostep.media.patches import edge_loss, random_crop
from twostep.pretrain.drawings import DrawingSet, Placement, compose, random_backgrounds
from twostep.pretrain.loop import BLOCKS, PartSettings, silent, train_network
from twostep.pretrain.model import build_vae
from twostep.pretrain.scenes import SceneTable, random_scenes
from twostep.pretrain.scenes import compose as compose_scenes
from twostep.pretrain.sizes import find_size
from twostep.training.compiling import compile_blocks
from twostep.training.device import find_device
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder


class VaeSettings(PartSettings):
    """The recipe of an autoencoder."""

    part: Literal["vae"] = "vae"
    start: Path | None = Field(
        None, description="folder that holds `vae`, which is trained on; a fresh one if not given"
    )
    num_pictures: int = Field(
        8192, gt=0, description="composed pictures, or scenes, that crops are cut from"
    )
    crop_pixels: int = Field(
        32, ge=16, description="side of the crops; a multiple of the pixels of a latent's side"
    )
    square_weight: float = Field(0.0, ge=0, description="weight of the squared error of pixels")
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
    compile: bool = Field(
        False, description="compile the blocks: half a minute at first, less for every iteration"
    )


@runtime_checkable
class PictureSource(Protocol):
    """Where an autoencoder's pictures come from, and the noise that is added to their latents."""

    def draw(self, count: int, randomness: Randomness) -> Float[Tensor, "count 3 h w"]:
        """Return the pictures of an iteration, in -1..1."""

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return normal noise of an iteration; asked for once in each, after the pictures."""


@dataclass(frozen=True, eq=False)
class PicturePool:
    """Pictures that were all composed before, on the CPU; its randomness is drawn there too."""

    pictures: Float[Tensor, "pool 3 h w"]

    def draw(self, count: int, randomness: Randomness) -> Float[Tensor, "count 3 h w"]:
        """Return random pictures of the pool."""
        rows = torch.randint(len(self.pictures), (count,), generator=randomness.tensors)
        return self.pictures[rows]

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return noise that is the same on every device."""
        return randomness.normal(shape)


@dataclass(frozen=True, eq=False)
class ComposedScenes:
    """Scenes that are composed when they are drawn, on the device where all of this lies."""

    scenes: SceneTable
    drawings: UInt8[Tensor, "concepts styles 4 side side"]
    pixels: int

    def draw(self, count: int, randomness: Randomness) -> Float[Tensor, "count 3 h w"]:
        """Compose random scenes of the table."""
        rows = torch.randint(len(self.scenes), (count,), generator=randomness.tensors)
        chosen = self.scenes.rows(sent(rows, self.drawings.device))
        return compose_scenes(chosen, self.drawings, self.pixels)

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return noise that is drawn on the device."""
        return randomness.normal(shape, self.drawings.device)


def find_pictures(drawings: DrawingSet, settings: VaeSettings) -> PictureSource:
    """Return what an autoencoder of the recipe's size learns from, made of these drawings."""
    size = find_size(settings.size)
    if size.learns_from == "drawings":
        first = Randomness.at(settings.loop.seed, -1)
        return PicturePool(
            random_pictures(drawings, settings.num_pictures, size.pixels, first.tensors)
        )
    device = find_device(settings.device)
    scenes = random_scenes(
        len(drawings.concepts),
        len(drawings.styles),
        count=settings.num_pictures,
        seed=settings.loop.seed,
    )
    return ComposedScenes(scenes.to(device), drawings.drawings.to(device), size.pixels)


def train_vae(
    drawings: DrawingSet,
    settings: VaeSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int, AutoencoderTiny], None] = lambda iteration, vae: None,
) -> ImageCodec:
    """Train an autoencoder on composed pictures; return it with its averaged weights.

    `on_checkpoint` is called before every checkpoint with the averaged weights in it.

    Raises:
        ModelError: the weights that the recipe starts from are missing, damaged, or of another
            shape than its size has.
    """
    size = find_size(settings.size)
    device = find_device(settings.device)
    torch.manual_seed(settings.loop.seed)
    vae = build_vae(size)
    if settings.start is not None:
        found = FolderFiles(settings.start).weights(vae, PARTS["vae"], torch.float32)
        vae.load_state_dict(found)
    vae = vae.to(device, memory_format=torch.channels_last)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(vae)
    if settings.compile:
        compile_blocks(vae, BLOCKS)
    vae.train()
    pictures = find_pictures(drawings, settings)

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        batch_size = settings.loop.batch_size
        share = world().share(batch_size)
        whole = pictures.draw(batch_size, randomness)
        crops = random_crop(whole, settings.crop_pixels, randomness.tensors)[share]
        crops = sent(crops, device).to(memory_format=torch.channels_last)
        latents: Tensor = vae.encode(crops).latents.float()
        noise = pictures.noise((batch_size, *latents.shape[1:]), randomness)[share]
        noisy = latents + settings.jitter * sent(noise, device)
        difference: Tensor = vae.decode(noisy).sample.float() - crops
        edges = edge_loss(difference)
        moments = moment_loss(latents)
        penalties: Tensor = settings.edge_weight * edges + settings.moment_weight * moments
        if settings.square_weight > 0:
            penalties = penalties + settings.square_weight * difference.square().mean()
        return difference.abs().mean() + penalties

    train_network(
        vae,
        loss,
        settings.loop,
        folder,
        name="vae",
        on_iteration=on_iteration,
        on_checkpoint=lambda iteration: on_checkpoint(iteration, vae),
    )
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
