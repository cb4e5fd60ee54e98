"""The emoji set as latents: composited and encoded once, captioned anew every time one is drawn.

So neither drawings nor codec are needed while a denoiser trains.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS, Attributes
from twostep.files import write_atomically
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.sdxl import text_encoders
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.captions import Omission, caption
from twostep.pretrain.drawings import EmojiError, EmojiSet, Placement, compose, load_emoji
from twostep.text.clip import TextEncoders
from twostep.training.processes import wait, world


@dataclass(frozen=True, eq=False)
class LatentCache:
    """Latents of composited drawings, and what is on each: row of `labels` = concept, style,
    background.
    """

    latents: Float16[Tensor, "count c h w"]
    labels: UInt8[Tensor, "count 3"]
    names: tuple[tuple[tuple[str, ...], str], ...]
    styles: tuple[str, ...]
    omission: Omission = field(default_factory=Omission)

    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Float[Tensor, "count c h w"], list[str]]:
        """Return random latents with captions that often say less than there is."""
        rows = torch.randint(len(self.latents), (count,), generator=tensors)
        return self.latents[rows].float(), [self.caption(row, words) for row in rows.tolist()]

    def caption(self, row: int, words: random.Random) -> str:
        """Return a caption of one row, which often says less than there is."""
        concept, style, background = self.labels[row].tolist()
        names, subgroup = self.names[concept]
        said: Attributes = self.omission.apply(
            names, subgroup, self.styles[style], list(BACKGROUNDS)[background], words
        )
        return caption(said, words)

    def save(self, path: Path) -> None:
        """Write the cache to one safetensors file."""
        words = json.dumps({"names": self.names, "styles": self.styles})
        with write_atomically(path) as file:
            file.write(
                save({"latents": self.latents, "labels": self.labels}, {"twostep.latents": words})
            )


@dataclass(frozen=True, eq=False)
class EmojiSource:
    """The emoji set's latents, all of one size in pixels, with captions that are written and
    encoded at every draw.
    """

    latents: LatentCache
    text: TextEncoders
    width: int
    height: int

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: random.Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of captions that often say less than there is."""
        x0, captions = self.latents.draw(count, tensors, words)
        return x0, self.text.conditioning(captions, self.width, self.height)

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt, repeated."""
        return self._empty.expand(len(like))

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            return self.text.conditioning([""], self.width, self.height)


def builtin(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    variants: int = 32,
    emoji: str = "runs/emoji.safetensors",
) -> EmojiSource:
    """Return the built-in drawings as the teacher's latents, made in the run's folder at the first
    time.
    """
    latents = find_latents(
        out / "latents.safetensors",
        load_emoji(Path(emoji)),
        teacher.codec,
        variants=variants,
        on_variant=lambda done, total: advance(done, total, "latents"),
    )
    return EmojiSource(latents, text_encoders(teacher), *teacher.contract.sizes[0])


def load_latents(path: Path) -> LatentCache:
    """Read a cache written by `LatentCache.save`; EmojiError where it is missing, damaged or holds
    NaN.
    """
    try:
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {})["twostep.latents"])
            latents, labels = file.get_tensor("latents"), file.get_tensor("labels")
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise EmojiError(
            f"{path} is no latent cache ({error!r}). Delete it; it is built again from drawings."
        ) from error
    if not torch.isfinite(latents).all():
        raise EmojiError(
            f"{path} holds values that are no numbers. Delete it; it is built again from drawings."
        )
    names = tuple((tuple(group), subgroup) for group, subgroup in words["names"])
    return LatentCache(latents, labels, names, tuple(words["styles"]))


def find_latents(
    path: Path,
    drawings: EmojiSet,
    codec: ImageCodec,
    *,
    variants: int,
    on_variant: Callable[[int, int], None],
) -> LatentCache:
    """Read the cache at `path`, made there of the drawings by the first process if
    it is not there.
    """
    if world().is_first and not path.exists():
        cache_latents(drawings, codec, variants=variants, on_variant=on_variant).save(path)
    wait()
    return load_latents(path)


def cache_latents(
    emoji: EmojiSet,
    codec: ImageCodec,
    *,
    variants: int = 96,
    seed: int = 0,
    on_variant: Callable[[int, int], None] = lambda done, total: None,
) -> LatentCache:
    """Composite every drawing `variants` times, each on a random background, and encode it."""
    num_concepts, num_styles = emoji.drawings.shape[:2]
    drawings = emoji.drawings.flatten(0, 1)
    concept, style = torch.meshgrid(
        torch.arange(num_concepts), torch.arange(num_styles), indexing="ij"
    )
    generator = torch.Generator().manual_seed(seed)
    latents, labels = [], []
    for variant in range(variants):
        background: Int[Tensor, " drawings"] = torch.randint(
            len(BACKGROUNDS), (len(drawings),), generator=generator
        )
        pictures = compose(drawings, background, Placement(), generator)
        latents += [codec.encode(batch).half() for batch in pictures.split(128)]
        labels.append(
            torch.stack([concept.flatten(), style.flatten(), background], dim=1).to(torch.uint8)
        )
        on_variant(variant + 1, variants)
    names = tuple((concept.names, concept.subgroup) for concept in emoji.concepts)
    return LatentCache(torch.cat(latents), torch.cat(labels), names, emoji.styles)
