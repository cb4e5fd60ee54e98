"""Clips of drawings that move in known ways, composed anew whenever one is drawn.

The flow of every clip is known exactly, so they are what measures of motion are tried on, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from twostep.data.drawn import FIRST_SEED, WalkedSource, planned_items, walks_of
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.evaluate.motions import MOTIONS, find_motion
from twostep.models.bundle import Bundle
from twostep.networks.backbone import num_variants
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.captions import Omission
from twostep.pretrain.drawings import (
    BUILT_IN,
    DrawingSet,
    lay_on,
    listed_names,
    load_drawings,
    random_backgrounds,
)
from twostep.pretrain.latents import CaptionedSource
from twostep.training.recipe import RecipeError

_SCALE = (0.55, 0.7)
"""Side of a drawing in the middle of its clip, as a share of the picture's; it needs room to move.
"""

_JITTER = 0.04
"""How far the middle of a path lies off the middle of the picture at most, each way."""

_SPEED = (0.75, 1.25)
"""By what the path of a kind of motion is longer or shorter."""

_SUPERSAMPLED = 2
"""Frames are drawn at so many times their side and averaged down, so edges stay clean."""


@dataclass(frozen=True, eq=False)
class Paths:
    """Where the drawings of clips are, frame by frame.

    Attributes:
        centre: (right, down) in shares of the picture's side, from its middle.
        angle: clockwise as it is seen, in radians.
        scale: side of the drawing, as a share of the picture's.
    """

    centre: Float[Tensor, "clips frames 2"]
    angle: Float[Tensor, "clips frames"]
    scale: Float[Tensor, "clips frames"]

    def to(self, device: torch.device) -> Paths:
        """Return the same paths on a device."""
        return Paths(self.centre.to(device), self.angle.to(device), self.scale.to(device))

    def at(self, numbers: Int[Tensor, " chosen"]) -> Paths:
        """Return where the drawings are in some of the frames."""
        return Paths(self.centre[:, numbers], self.angle[:, numbers], self.scale[:, numbers])


def random_paths(
    kinds: Sequence[str], num_frames: int, generator: torch.Generator, *, alike: int = 1
) -> Paths:
    """Draw one path of each of the kinds of motion.

    Paths of a kind differ in size, place and, by a quarter each way, in how far they go. Sizes stay
    so small that drawings hardly leave the picture.

    Args:
        kinds: one for each path.
        num_frames: of a clip.
        generator: of the random numbers.
        alike: so many in a row differ in nothing but their kind.
    """
    count = len(kinds) // alike
    numbers = torch.rand(3, count, 1, generator=generator).repeat_interleave(alike, dim=1)
    size, speed, start = numbers
    shift = 2 * torch.rand(count, 1, 2, generator=generator) - 1
    shift = shift.repeat_interleave(alike, dim=0)
    motions = [find_motion(kind) for kind in kinds]
    speed = _SPEED[0] + speed * (_SPEED[1] - _SPEED[0])
    time = torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.full((1,), 0.5)

    def of_motions(attribute: str) -> Tensor:
        values = [float(getattr(motion, attribute)) for motion in motions]
        return torch.tensor(values)[:, None]

    hop = (math.pi * of_motions("hops") * time).sin().abs() * of_motions("height")
    hop = torch.where(of_motions("hops") > 0, hop - of_motions("height") / 2, torch.zeros(()))
    right = of_motions("right") * speed * (time - 0.5)
    down = of_motions("down") * speed * (time - 0.5) - hop * speed
    centre = torch.stack([right, down], dim=-1) + _JITTER * shift
    # A turn that ends where it began: the last frame is one step before the first.
    around = torch.arange(num_frames) / num_frames
    angle = 2 * math.pi * of_motions("turns") * around
    growth = of_motions("growth").log() * speed
    scale = _SCALE[0] + size * (_SCALE[1] - _SCALE[0])
    lean = (2 * start - 1) * math.radians(6)
    return Paths(centre, angle + lean, scale * (growth * (time - 0.5)).exp())


def animate(
    drawings: UInt8[Tensor, "clips 4 height width"],
    background: Int[Tensor, " clips"],
    paths: Paths,
    *,
    pixels: int,
) -> Float[Tensor, "clips 3 frames pixels pixels"]:
    """Move drawings on plain backgrounds along paths; return clips in -1..1.

    Args:
        drawings: RGBA, 0..255.
        background: numbers of BACKGROUNDS.
        paths: one for each drawing.
        pixels: side of the frames.
    """
    num_frames = paths.angle.shape[1]
    angle = paths.angle.flatten()
    scale = paths.scale.flatten()
    # From places of the frame to places of the drawing, both in -1..1.
    cosine = torch.cos(angle) / scale
    sine = torch.sin(angle) / scale
    turned = torch.stack([torch.stack([cosine, sine], -1), torch.stack([-sine, cosine], -1)], -2)
    shift = 2 * paths.centre.flatten(0, 1)[:, :, None]
    theta = torch.cat([turned, -(turned @ shift)], dim=2)
    canvas = _SUPERSAMPLED * pixels
    grid = functional.affine_grid(theta, [len(theta), 4, canvas, canvas], align_corners=False)
    rgba = drawings.float() / 255
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    frames = premultiplied.repeat_interleave(num_frames, dim=0)
    placed = functional.grid_sample(frames, grid, align_corners=False)
    pictures = lay_on(
        functional.avg_pool2d(placed, _SUPERSAMPLED), background.repeat_interleave(num_frames)
    )
    clips: Tensor = pictures.unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous()
    return clips


@dataclass(frozen=True)
class ClipLabels:
    """What is on a clip: the numbers of concept, style and background, and the kind of motion."""

    concept: int
    style: int
    background: int
    kind: str


@dataclass(frozen=True, eq=False)
class MovingDrawings:
    """Latents of clips with captions, composed and encoded whenever they are drawn.

    Attributes:
        drawings: what moves.
        bundle: whose codec encodes, and says how long clips are.
        kinds: of motion.
        omission: how often captions leave something out.
        together: whether every drawing comes in all kinds one after the other, along paths that
            differ in nothing else, with captions that do not either.
        backgrounds: the first so many of BACKGROUNDS are drawn.
    """

    drawings: DrawingSet
    bundle: Bundle
    kinds: tuple[str, ...] = tuple(MOTIONS)
    omission: Omission = field(default_factory=Omission)
    together: bool = False
    backgrounds: int = len(BACKGROUNDS)

    @property
    def alike(self) -> int:
        """How many clips in a row differ in nothing but their kind of motion."""
        return len(self.kinds) if self.together else 1

    def compose(
        self,
        count: int,
        tensors: torch.Generator,
        numbers: Int[Tensor, " chosen"] | None = None,
    ) -> tuple[Float[Tensor, "count 3 frames height width"], list[ClipLabels]]:
        """Return random clips in -1..1, composed on the bundle's device, and what is on each.

        Args:
            count: of clips; a multiple of `alike`.
            tensors: what is drawn comes from it.
            numbers: of the frames that are wanted; all if not given.
        """
        if count % self.alike:
            raise RecipeError(
                f"{count} clips are not the {self.alike} kinds of motion of any number of "
                f"drawings. Give a batch_size that is a multiple of {self.alike}."
            )
        num_drawings = count // self.alike
        num_concepts, num_styles = self.drawings.drawings.shape[:2]
        concept = torch.randint(num_concepts, (num_drawings,), generator=tensors)
        style = torch.randint(num_styles, (num_drawings,), generator=tensors)
        background = random_backgrounds(num_drawings, tensors, among=self.backgrounds)
        concept, style, background = (
            each.repeat_interleave(self.alike) for each in (concept, style, background)
        )
        if self.together:
            kinds = list(self.kinds) * num_drawings
        else:
            kind = torch.randint(len(self.kinds), (count,), generator=tensors)
            kinds = [self.kinds[number] for number in kind.tolist()]
        pixels = self.bundle.contract.sizes[0][0]
        _, num_frames, *_ = self.bundle.latent_shape(pixels, pixels)
        paths = random_paths(kinds, num_frames, tensors, alike=self.alike)
        if numbers is not None:
            paths = paths.at(numbers)
        device = self.bundle.denoiser.device
        chosen = self.drawings.drawings[concept, style].to(device)
        clips = animate(chosen, background.to(device), paths.to(device), pixels=pixels)
        labels = zip(concept.tolist(), style.tolist(), background.tolist(), kinds, strict=True)
        return clips, [ClipLabels(*each) for each in labels]

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Float[Tensor, "count c frames h w"], list[str]]:
        """Return latents of random clips with captions, which often say less than there is."""
        latents, captions, _ = self.draw_frames(count, tensors, words)
        return latents, captions

    @torch.no_grad()
    def draw_frames(
        self,
        count: int,
        tensors: torch.Generator,
        words: Random,
        numbers: Int[Tensor, " chosen"] | None = None,
    ) -> tuple[Float[Tensor, "count c chosen h w"], list[str], list[str]]:
        """Return latents of random clips, of some frames or all, with captions and kinds."""
        clips, labels = self.compose(count, tensors, numbers)
        captions = []
        for place, each in enumerate(labels):
            if place % self.alike == 0:
                picture = self._picture_caption(each, words)
            captions.append(moving_caption(picture, each.kind, words))
        latents = self.bundle.codec.encode(clips).float().cpu()
        return latents, captions, [each.kind for each in labels]

    def captions(self, count: int, seed: int) -> list[str]:
        """Return captions of random clips, which nobody draws; the same ones of a seed.

        Fewer are the first of more, so what was drawn of them is still good when more are wanted.
        """
        words = Random(seed)
        tensors = torch.Generator().manual_seed(seed)
        labels: list[ClipLabels] = []
        while len(labels) < count:
            labels += self.compose(self.alike, tensors, numbers=torch.tensor([0]))[1]
        return [self.caption(each, words) for each in labels[:count]]

    def caption(self, labels: ClipLabels, words: Random) -> str:
        """Return a caption of one clip: what a picture of it is called, and how it moves."""
        return moving_caption(self._picture_caption(labels, words), labels.kind, words)

    def _picture_caption(self, labels: ClipLabels, words: Random) -> str:
        names, subgroup = self._names[labels.concept]
        return self.omission.caption(
            names,
            subgroup,
            style=self.drawings.styles[labels.style],
            background=list(BACKGROUNDS)[labels.background],
            rng=words,
        )

    @cached_property
    def _names(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        return listed_names(self.drawings.concepts)


def moving_caption(picture: str, kind: str, words: Random) -> str:
    """Return the caption of a picture with the words of a motion after it.

    They come last: a CLIP text encoder reads from left to right, so all that comes before is
    encoded as in the captions that the picture model knows. The usual words come up in three of
    four captions; an empty caption stays empty, for guidance.
    """
    motion = find_motion(kind)
    if not motion.words or not picture:
        return picture
    usual = motion.words[0]
    others = motion.words[1:]
    chosen = usual if not others or words.random() < 0.75 else words.choice(others)
    return f"{picture}, {chosen}"


@dataclass(frozen=True, eq=False)
class ClipSource(CaptionedSource):
    """Clips for distillation; where there are several picture models, items are for each in turn.

    Attributes:
        num_variants: picture models that there are.
    """

    num_variants: int = 1

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of their captions."""
        x0, conditioning = super().draw(count, tensors, words)
        return x0, self._shared_out(conditioning, tensors)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items, and the same models."""
        return replace(super().empty(like), variants=like.variants)

    def _shared_out(self, conditioning: Conditioning, tensors: torch.Generator) -> Conditioning:
        if self.num_variants == 1:
            return conditioning
        first = int(torch.randint(self.num_variants, (1,), generator=tensors))
        variants = [(first + place) % self.num_variants for place in range(len(conditioning))]
        return replace(conditioning, variants=tuple(variants))


def moving_drawings(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    drawings: str = str(BUILT_IN),
) -> ClipSource:
    """Return moving drawings as the teacher's latents, for `data` of a recipe.

    Args:
        teacher: a model of clips, whose codec and text encoders are used.
        out: the run's folder; nothing is kept there.
        advance: called with what is done; nothing takes long here.
        drawings: folder of the drawings; the built-in ones if not given.
    """
    clips = MovingDrawings(load_drawings(Path(drawings)), teacher)
    width, height = teacher.contract.sizes[0]
    variants = num_variants(teacher.denoiser.backbone)
    return ClipSource(clips, teacher.text, width, height, num_variants=variants)


def walked_drawings(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    drawings: str = str(BUILT_IN),
    count: int = 256,
    steps: int = 16,
    sampler: str = "dpmpp-2m",
    batch_size: int = 1,
) -> WalkedSource:
    """Let the teacher walk from noise to clips with the captions of moving drawings, for `data`.

    Args:
        teacher: a model of clips.
        out: the run's folder; walks are kept in its folder `walked`.
        advance: called with what is drawn, of how many, and a word on it.
        drawings: folder of the drawings whose captions are taken; the built-in ones if not given.
        count, steps, sampler, batch_size: as of `data.drawn.walked_by_teacher`.
    """
    clips = MovingDrawings(load_drawings(Path(drawings)), teacher)
    prompts = clips.captions(count, FIRST_SEED)
    items = planned_items(prompts, count, num_variants(teacher.denoiser.backbone))
    return walks_of(
        teacher, items, out, advance, steps=steps, sampler=sampler, batch_size=batch_size
    )
