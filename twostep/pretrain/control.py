"""A ControlNet (arXiv 2302.05543) for a built-in teacher, steered by silhouettes.

A silhouette is white where the drawing is, else black. The encoder is the teacher's without
attention to text, which the UNet has itself: half the size. It learns the error of v, not of eps,
since few-step students ask it at high noise, where errors of eps count for next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import ControlNetModel
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from twostep.models.bundle import Bundle
from twostep.networks.control import Hint
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.drawings import (
    DrawingSet,
    Placement,
    lay_on,
    listed_names,
    place_drawings,
    random_backgrounds,
)
from twostep.pretrain.latents import LatentCache
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder

PLACEMENT = Placement(
    smallest_scale=0.6, largest_scale=0.94, shift_pixels=9.0, rotation_degrees=20.0
)
"""Freer than in the teacher's own pictures, or there would be little to steer."""

_TAKEN_OVER = (
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "cross_attention_dim",
    "attention_head_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""What a ControlNet's configuration has in common with that of its UNet."""


class ControlSettings(PartSettings):
    """The recipe of a ControlNet."""

    part: Literal["control"] = "control"
    model: str = Field("nano", description="the teacher that it is made for")
    variants: int = Field(64, gt=0, description="pictures of every drawing, with their silhouettes")
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )


@dataclass(frozen=True, eq=False)
class Silhouettes:
    """Composed drawings as latents, and the silhouette of each: 1 where the drawing is, else 0."""

    drawn: LatentCache
    masks: UInt8[Tensor, "count height width"]


def build_control(denoiser: Denoiser) -> ControlNetModel:
    """Return a ControlNet that changes nothing yet.

    Its layers start as the teacher's, where that has them.
    """
    config: Any = denoiser.network.config
    control = ControlNetModel(
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(16, 32, 64),
        **{name: config[name] for name in _TAKEN_OVER},
    )
    names = control.state_dict().keys()
    weights = denoiser.network.state_dict()
    shared = {key: value for key, value in weights.items() if key in names}
    control.load_state_dict(shared, strict=False)
    return control


def draw_silhouettes(drawings: DrawingSet, bundle: Bundle, variants: int, seed: int) -> Silhouettes:
    """Compose every drawing `variants` times on random backgrounds, and keep its silhouette."""
    flat = drawings.drawings.flatten(0, 1)
    num_styles = len(drawings.styles)
    number = torch.arange(len(flat))
    generator = torch.Generator().manual_seed(seed)
    pixels = bundle.contract.sizes[0][0]
    latents = []
    masks = []
    labels = []
    for _ in range(variants):
        placed = place_drawings(flat, PLACEMENT, generator, pixels=pixels)
        background = random_backgrounds(len(flat), generator)
        pictures = lay_on(placed, background)
        latents += [bundle.codec.encode(part).half() for part in pictures.split(128)]
        masks.append((placed[:, 3] > 0.5).to(torch.uint8))
        columns = (number // num_styles, number % num_styles, background)
        labels.append(torch.stack(columns, dim=1).to(torch.uint8))
    names = listed_names(drawings.concepts)
    drawn = LatentCache(torch.cat(latents), torch.cat(labels), names, drawings.styles)
    return Silhouettes(drawn, torch.cat(masks))


def hints_of(
    masks: UInt8[Tensor, "batch height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Return silhouettes as the pictures that the ControlNet sees, in 0..1."""
    return masks[:, None].float().expand(-1, 3, -1, -1)


def train_control(
    drawings: DrawingSet,
    bundle: Bundle,
    settings: ControlSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int, ControlNetModel], None] = lambda iteration, control: None,
) -> ControlNetModel:
    """Train a ControlNet on the frozen teacher, on its device; return it with averaged weights.

    `on_checkpoint` is called before every checkpoint with the averaged weights in the ControlNet.
    """
    denoiser = bundle.denoiser
    device = denoiser.device
    batch_size = settings.loop.batch_size
    top = int(denoiser.schedule.top)  # SDXL's times are integers
    width, height = bundle.contract.sizes[0]
    torch.manual_seed(settings.loop.seed)
    control = build_control(denoiser).to(device).train()
    if settings.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    silhouettes = draw_silhouettes(drawings, bundle, settings.variants, settings.loop.seed)
    drawn = silhouettes.drawn
    all_times = frozenset(range(1, top + 1))

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        share = world().share(batch_size)
        rows = torch.randint(len(drawn.latents), (batch_size,), generator=generator)
        captions = [drawn.caption(row, randomness.words) for row in rows.tolist()]
        t = torch.randint(1, top + 1, (batch_size,), generator=generator)[share]
        eps = torch.randn((batch_size, *drawn.latents.shape[1:]), generator=generator)[share]
        eps = eps.to(device)
        x0 = drawn.latents[rows[share]].float().to(device)
        hints = hints_of(silhouettes.masks[rows[share]]).to(device)
        with torch.no_grad():
            conditioning = bundle.text.conditioning(captions[share], width, height)
        conditioning = replace(conditioning, hints=(Hint(control, hints, 1.0, all_times),))
        alpha, sigma = denoiser.schedule.coefficients(t, x0)
        predicted = denoiser(alpha * x0 + sigma * eps, t, conditioning)
        error: Tensor = predicted.v(alpha, sigma) - (alpha * eps - sigma * x0)
        return error.square().mean()

    train_network(
        control,
        loss,
        settings.loop,
        folder,
        name="control",
        on_iteration=on_iteration,
        on_checkpoint=lambda iteration: on_checkpoint(iteration, control),
    )
    return control
