"""A ControlNet (arXiv 2302.05543) for a built-in teacher, steered by silhouettes.

A silhouette is white where the drawing is, else black. Of a scene it has both things. The encoder
is the teacher's without attention to text, which the UNet has itself: half the size. It learns the
error of v, not of eps, since few-step students ask it at high noise, where errors of eps count for
next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import ControlNetModel
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from twostep.diffusion.shapes import Latents, sent
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.models.bundle import Bundle
from twostep.models.sdxl import text_encoders
from twostep.networks.conditioning import Conditioning, image_sizes
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
from twostep.pretrain.encoded_scenes import EncodedScenes, make_encoded_scenes
from twostep.pretrain.latents import LatentCache
from twostep.pretrain.loop import BLOCKS, PartSettings, silent, train_network
from twostep.pretrain.scenes import SceneTable, compose
from twostep.pretrain.sizes import find_size
from twostep.training.compiling import compile_blocks
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


_HINT_CHANNELS = (16, 32, 64, 128)
"""Widths through which a ControlNet's picture goes first; each but the first halves it."""


class ControlSettings(PartSettings):
    """The recipe of a ControlNet."""

    part: Literal["control"] = "control"
    model: str = Field("nano", description="the teacher that it is made for")
    variants: int = Field(64, gt=0, description="pictures of every drawing, with their silhouettes")
    scenes: int = Field(
        50_000, gt=0, description="the same where the size learns from scenes: how many of these"
    )
    gradient_checkpointing: bool = Field(
        False, description="less memory for activations, about a third slower"
    )
    compile: bool = Field(
        False, description="compile the blocks: half a minute at first, less for every iteration"
    )


@dataclass(frozen=True, eq=False)
class Silhouettes:
    """Composed drawings as latents, and the silhouette of each: 1 where the drawing is, else 0."""

    drawn: LatentCache
    masks: UInt8[Tensor, "count height width"]


def build_control(denoiser: Denoiser, *, pixels_per_latent: int = 4) -> ControlNetModel:
    """Return a ControlNet that changes nothing yet.

    Its layers start as the teacher's, where that has them.

    Args:
        denoiser: the teacher's.
        pixels_per_latent: along a side; a power of 2, to which its pictures are scaled down.
    """
    num_halvings = pixels_per_latent.bit_length() - 1
    config: Any = denoiser.network.config
    control = ControlNetModel(
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=_HINT_CHANNELS[: num_halvings + 1],
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


def scene_silhouettes(
    table: SceneTable, drawings: UInt8[Tensor, "concepts styles 4 side side"], pixels: int
) -> UInt8[Tensor, "scenes pixels pixels"]:
    """Return the silhouettes of scenes: 1 where a thing hides more than half of the ground.

    How much it hides is what two grounds, one light and one dark, still differ by behind it.
    """
    colours = list(BACKGROUNDS)
    light, dark = (
        compose(replace(table, colours=torch.full_like(table.colours, number)), drawings, pixels)
        for number in (colours.index("white"), colours.index("black"))
    )
    whole = sum(BACKGROUNDS["white"]) - sum(BACKGROUNDS["black"])
    seen = (light - dark).sum(dim=1) * 255 / 2 / whole
    return (seen < 0.5).to(torch.uint8)


def hints_of(
    masks: UInt8[Tensor, "batch height width"],
) -> Float[Tensor, "batch 3 height width"]:
    """Return silhouettes as the pictures that the ControlNet sees, in 0..1."""
    return masks[:, None].float().expand(-1, 3, -1, -1)


@runtime_checkable
class ControlExamples(Protocol):
    """Where a ControlNet's examples come from."""

    def draw(
        self, count: int, share: slice, randomness: Randomness
    ) -> tuple[Latents, Conditioning, UInt8[Tensor, "items height width"]]:
        """Return a share of `count` random latents, their conditioning, and their silhouettes."""

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return normal noise of an iteration; asked for once in each, after examples and times."""


@dataclass(frozen=True, eq=False)
class DrawnExamples:
    """Composed drawings of nano; all that is random is drawn on the CPU."""

    silhouettes: Silhouettes
    bundle: Bundle

    def draw(
        self, count: int, share: slice, randomness: Randomness
    ) -> tuple[Latents, Conditioning, UInt8[Tensor, "items height width"]]:
        """Return random drawings, with captions that are written now."""
        drawn = self.silhouettes.drawn
        device = self.bundle.denoiser.device
        rows = torch.randint(len(drawn.latents), (count,), generator=randomness.tensors)
        captions = [drawn.caption(row, randomness.words) for row in rows.tolist()]
        with torch.no_grad():
            conditioning = self.bundle.conditioning(captions[share], *self.bundle.contract.sizes[0])
        masks = self.silhouettes.masks[rows[share]]
        return sent(drawn.latents[rows[share]].float(), device), conditioning, sent(masks, device)

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return noise that is the same on every device."""
        return randomness.normal(shape)


@dataclass(frozen=True, eq=False)
class SceneExamples:
    """Encoded scenes, whose silhouettes are composed when they are drawn, all on one device."""

    scenes: EncodedScenes
    drawings: UInt8[Tensor, "concepts styles 4 side side"]
    bundle: Bundle

    def draw(
        self, count: int, share: slice, randomness: Randomness
    ) -> tuple[Latents, Conditioning, UInt8[Tensor, "items height width"]]:
        """Return random scenes, with one of their captions."""
        width, height = self.bundle.contract.sizes[0]
        rows, tokens = self.scenes.choose(count, randomness.tensors)
        rows = rows[share]
        tokens = tokens[share]
        with torch.no_grad():
            text, pooled = text_encoders(self.bundle).encode_tokens(tokens, tokens)
        sizes = sent(image_sizes(1, width, height), rows.device).expand(len(rows), -1)
        masks = scene_silhouettes(self.scenes.table.rows(rows), self.drawings, width)
        return self.scenes.latents[rows].float(), Conditioning(text, pooled, sizes), masks

    def noise(self, shape: Sequence[int], randomness: Randomness) -> Tensor:
        """Return noise that is drawn on the device."""
        return randomness.normal(shape, self.scenes.device)


def find_examples(
    drawings: DrawingSet, bundle: Bundle, settings: ControlSettings
) -> ControlExamples:
    """Return what a ControlNet of the recipe's size learns from, made of these drawings."""
    if find_size(settings.size).learns_from == "drawings":
        silhouettes = draw_silhouettes(drawings, bundle, settings.variants, settings.loop.seed)
        return DrawnExamples(silhouettes, bundle)
    device = bundle.denoiser.device
    scenes = make_encoded_scenes(
        drawings,
        bundle.codec,
        text_encoders(bundle).tokenizers[0],
        pixels=bundle.contract.sizes[0][0],
        count=settings.scenes,
        captions=1,
        seed=settings.loop.seed,
        device=device,
    )
    return SceneExamples(scenes, drawings.drawings.to(device), bundle)


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
    torch.manual_seed(settings.loop.seed)
    width = bundle.contract.sizes[0][0]
    pixels_per_latent = width // bundle.latent_shape(width, width)[-1]
    control = build_control(denoiser, pixels_per_latent=pixels_per_latent).to(device).train()
    if settings.gradient_checkpointing:
        control.enable_gradient_checkpointing()
    if settings.compile:
        compile_blocks(control, BLOCKS)
    examples = find_examples(drawings, bundle, settings)
    all_times = frozenset(range(1, top + 1))

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        share = world().share(batch_size)
        x0, conditioning, masks = examples.draw(batch_size, share, randomness)
        t = torch.randint(1, top + 1, (batch_size,), generator=randomness.tensors)[share]
        eps = sent(examples.noise((batch_size, *x0.shape[1:]), randomness)[share], device)
        hint = Hint(control, hints_of(masks), 1.0, all_times)
        conditioning = replace(conditioning, hints=(hint,))
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
