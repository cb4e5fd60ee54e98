"""Drawings as latents: composed and encoded once, captioned anew every time one is drawn.

So neither drawings nor codec are needed while a denoiser trains.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float16, UInt8
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from twostep.diffusion.shapes import Batch
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.files import write_atomically
from twostep.media.codec import Codec
from twostep.models.bundle import Bundle, PromptEncoder
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.captions import Omission
from twostep.pretrain.drawings import (
    BUILT_IN,
    DrawingsError,
    DrawingSet,
    Placement,
    compose,
    listed_names,
    load_drawings,
    random_backgrounds,
)
from twostep.pretrain.kept import made_once, refusing_damage
from twostep.pretrain.progress import OnDone, untold

_METADATA_KEY = "twostep.latents"
_ENCODE_BATCH = 128


@runtime_checkable
class CaptionedLatents(Protocol):
    """What a teacher learns from."""

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Batch, list[str]]:
        """Return random latents, on the CPU, with a caption for each."""


class KeptLatents(CaptionedLatents, Protocol):
    """Captioned latents that are all in memory."""

    @property
    def latents(self) -> Tensor:
        """All of them, in half precision."""


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Latents of composed drawings, and what is on each.

    Attributes:
        latents: of pictures, in half precision.
        labels: numbers of concept, style and background, a row per latent.
        names: names and subgroup of every concept.
        styles: words of the styles.
        omission: how often captions leave something out.
    """

    latents: Float16[Tensor, "count c h w"]
    labels: UInt8[Tensor, "count 3"]
    names: tuple[tuple[tuple[str, ...], str], ...]
    styles: tuple[str, ...]
    omission: Omission = field(default_factory=Omission)

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Float[Tensor, "count c h w"], list[str]]:
        """Return random latents with captions, which often say less than there is."""
        rows = torch.randint(len(self.latents), (count,), generator=tensors)
        captions = [self.caption(row, words) for row in rows.tolist()]
        return self.latents[rows].float(), captions

    def caption(self, row: int, words: random.Random) -> str:
        """Return a caption of one row, which often says less than there is."""
        concept, style, background = self.labels[row].tolist()
        names, subgroup = self.names[concept]
        return self.omission.caption(
            names,
            subgroup,
            style=self.styles[style],
            background=list(BACKGROUNDS)[background],
            rng=words,
        )

    def save(self, path: Path) -> None:
        """Write the cache to one safetensors file; `load_latents` reads it."""
        listing = json.dumps({"names": self.names, "styles": self.styles})
        tensors = {"latents": self.latents, "labels": self.labels}
        with write_atomically(path) as file:
            file.write(save(tensors, {_METADATA_KEY: listing}))


@dataclass(frozen=True, eq=False)
class CaptionedSource:
    """Captioned latents for distillation; captions are written and encoded at every draw.

    All latents are of one size, `width` and `height` in pixels.
    """

    latents: CaptionedLatents
    text: PromptEncoder
    width: int
    height: int

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of their captions."""
        x0, captions = self.latents.draw(count, tensors, words)
        return x0, self.text.conditioning(captions, self.width, self.height)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items as `like` has."""
        return self._empty.expand(len(like))

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            return self.text.conditioning([""], self.width, self.height)


@dataclass(frozen=True, eq=False)
class LatentSource(CaptionedSource):
    """The same of latents that are kept, which can be drawn without captions too."""

    latents: KeptLatents

    def draw_latents(self, count: int, tensors: torch.Generator) -> Tensor:
        """Return random latents, whatever they are of."""
        rows = torch.randint(len(self.latents.latents), (count,), generator=tensors)
        return self.latents.latents[rows].float()


def builtin(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    variants: int = 32,
    drawings: str = str(BUILT_IN),
) -> LatentSource:
    """Return the drawings as the teacher's latents: what `data = "builtin"` in a recipe means.

    The latents are made in the run's folder at the first time, and read from there afterwards.

    Args:
        teacher: whose codec and text encoders are used.
        out: the run's folder.
        advance: called with what is done, of how many, and a word on it.
        variants: pictures that are composed of every drawing.
        drawings: folder of the drawings; the built-in ones if not given.
    """
    latents = find_latents(
        out / "latents.safetensors",
        lambda: load_drawings(Path(drawings)),
        teacher.codec,
        pixels=teacher.contract.sizes[0][0],
        variants=variants,
        on_variant=lambda done, total: advance(done, total, "latents"),
    )
    return LatentSource(latents, teacher.text, *teacher.contract.sizes[0])


def load_latents(path: Path) -> LatentCache:
    """Read a cache; DrawingsError if it is missing, damaged or holds NaN."""
    remedy = "it is built again from drawings"
    with (
        refusing_damage(path, DrawingsError, "is no latent cache", remedy),
        safe_open(path, "pt") as file,
    ):
        listing = json.loads((file.metadata() or {})[_METADATA_KEY])
        latents = file.get_tensor("latents")
        labels = file.get_tensor("labels")
    if not torch.isfinite(latents).all():
        raise DrawingsError(f"{path} holds values that are no numbers. Delete it; {remedy}.")
    names = tuple((tuple(group), subgroup) for group, subgroup in listing["names"])
    return LatentCache(latents, labels, names, tuple(listing["styles"]))


def find_latents(
    path: Path,
    drawings: Callable[[], DrawingSet],
    codec: Codec,
    *,
    pixels: int,
    variants: int,
    on_variant: OnDone,
) -> LatentCache:
    """Read the cache at `path`, after the first process has made it there if it is missing.

    Args:
        path: of the cache.
        drawings: loads the drawings, if they are needed.
        codec: encodes them.
        pixels: side of the pictures that are composed.
        variants: pictures of every drawing.
        on_variant: called with the number of variants that are done, and of all.
    """

    def make() -> LatentCache:
        return cache_latents(
            drawings(), codec, pixels=pixels, variants=variants, on_variant=on_variant
        )

    return made_once(path, make, load_latents)


def cache_latents(
    drawings: DrawingSet,
    codec: Codec,
    *,
    pixels: int,
    variants: int = 96,
    seed: int = 0,
    on_variant: OnDone = untold,
) -> LatentCache:
    """Compose every drawing `variants` times, each on a random background, and encode it."""
    num_concepts, num_styles = drawings.drawings.shape[:2]
    flat = drawings.drawings.flatten(0, 1)
    number = torch.arange(num_concepts * num_styles)
    generator = torch.Generator().manual_seed(seed)
    latents = []
    labels = []
    for variant in range(variants):
        background = random_backgrounds(len(flat), generator)
        pictures = compose(flat, background, Placement(), generator, pixels=pixels)
        latents += [codec.encode(batch).half() for batch in pictures.split(_ENCODE_BATCH)]
        columns = (number // num_styles, number % num_styles, background)
        labels.append(torch.stack(columns, dim=1).to(torch.uint8))
        on_variant(variant + 1, variants)
    return LatentCache(
        torch.cat(latents),
        torch.cat(labels),
        listed_names(drawings.concepts),
        drawings.styles,
    )
