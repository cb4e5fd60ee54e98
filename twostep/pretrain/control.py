"""A ControlNet (arXiv 2302.05543) for the nano teacher, steered by silhouettes: white where the
drawing is, else black.

Its encoder is the teacher's without attention to text, which the UNet has itself: half the size. It
learns the error of v, not of eps, since few-step students ask it at high noise, where errors of eps
count for next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import ControlNetModel
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.models.bundle import Bundle
from twostep.networks.control import Hint
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.descent import DescentSettings, silent, train
from twostep.pretrain.drawings import EmojiSet, Placement, lay_on, place_drawings
from twostep.pretrain.latents import LatentCache
from twostep.pretrain.model import PIXELS
from twostep.training.loop import OnIteration, Randomness
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder

PLACEMENT = Placement(
    smallest_scale=0.6, largest_scale=0.94, shift_pixels=9.0, rotation_degrees=20.0
)
"""Freer than the teacher's own pictures, or there would be little to steer."""


class SilhouetteSettings(Settings):
    """The recipe part of the ControlNet."""

    loop: DescentSettings
    model: str = Field("nano", description="the teacher that it is made for")
    variants: int = Field(
        64, gt=0, description="composites of every drawing, each with its silhouette"
    )


@dataclass(frozen=True)
class Silhouettes:
    """Composited drawings as latents, and the silhouette of each."""

    drawn: LatentCache
    masks: UInt8[Tensor, "count height width"]


def build_control(denoiser: Denoiser) -> ControlNetModel:
    """Return a ControlNet whose layers start as those of the teacher, where it has them, and that
    changes nothing.
    """
    told = denoiser.network.config
    names = (
        "block_out_channels",
        "layers_per_block",
        "norm_num_groups",
        "cross_attention_dim",
        "attention_head_dim",
    )
    added = (
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    control = ControlNetModel(
        down_block_types=("DownBlock2D",) * len(told.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(16, 32, 64),
        **{name: told[name] for name in (*names, *added)},
    )
    own = control.state_dict()
    control.load_state_dict(
        {key: value for key, value in denoiser.network.state_dict().items() if key in own},
        strict=False,
    )
    return control


def draw_silhouettes(emoji: EmojiSet, bundle: Bundle, variants: int, seed: int) -> Silhouettes:
    """Composite every drawing `variants` times, on random backgrounds, with the outline that it has
    there.
    """
    drawings, generator = emoji.drawings.flatten(0, 1), torch.Generator().manual_seed(seed)
    number = torch.arange(len(drawings))
    latents, masks, labels = [], [], []
    for _ in range(variants):
        placed = place_drawings(drawings, PLACEMENT, generator)
        background = torch.randint(len(BACKGROUNDS), (len(drawings),), generator=generator)
        latents += [
            bundle.codec.encode(part).half() for part in lay_on(placed, background).split(128)
        ]
        masks.append((placed[:, 3] > 0.5).to(torch.uint8))
        columns = (number // len(emoji.styles), number % len(emoji.styles), background)
        labels.append(torch.stack(columns, dim=1).to(torch.uint8))
    names = tuple((concept.names, concept.subgroup) for concept in emoji.concepts)
    return Silhouettes(
        LatentCache(torch.cat(latents), torch.cat(labels), names, emoji.styles), torch.cat(masks)
    )


def hints_of(masks: UInt8[Tensor, "batch height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Return silhouettes as the pictures that the ControlNet sees, in 0..1."""
    return masks[:, None].float().expand(-1, 3, -1, -1)


def train_silhouette(
    emoji: EmojiSet,
    bundle: Bundle,
    settings: SilhouetteSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int, ControlNetModel], None] = lambda iteration, control: None,
) -> ControlNetModel:
    """Train a ControlNet on the frozen teacher, where that is; returns it with averaged weights."""
    torch.manual_seed(settings.loop.seed)
    device, denoiser, schedule = (
        bundle.denoiser.device,
        bundle.denoiser,
        bundle.denoiser.schedule,
    )
    control = build_control(denoiser).to(device).train()
    silhouettes = draw_silhouettes(emoji, bundle, settings.variants, settings.loop.seed)
    drawn, always = silhouettes.drawn, frozenset(range(1, schedule.num_times + 1))

    def loss(iteration: int, draw: Randomness) -> Tensor:
        rows = torch.randint(
            len(drawn.latents), (settings.loop.batch_size,), generator=draw.tensors
        )
        captions = [drawn.caption(row, draw.words) for row in rows.tolist()]
        with torch.no_grad():
            conditioning = bundle.text.conditioning(captions, PIXELS, PIXELS)
        x0, hints = (
            drawn.latents[rows].float().to(device),
            hints_of(silhouettes.masks[rows]).to(device),
        )
        t = torch.randint(1, schedule.num_times + 1, (len(x0),), generator=draw.tensors)
        eps = torch.randn(x0.shape, generator=draw.tensors).to(device)
        alpha, sigma = schedule.coefficients(t, x0)
        conditioning = replace(conditioning, hints=(Hint(control, hints, 1.0, always),))
        predicted = denoiser(alpha * x0 + sigma * eps, t, conditioning)
        error: Tensor = predicted.v(alpha, sigma) - (alpha * eps - sigma * x0)
        return error.square().mean()

    train(
        control,
        loss,
        settings.loop,
        folder,
        "silhouette",
        on_iteration=on_iteration,
        on_checkpoint=lambda iteration: on_checkpoint(iteration, control),
    )
    return control
