"""Scenes as latents and tokens, made once and kept on the device that trains.

So a batch of any size is two lookups there: neither drawings nor autoencoder nor tokenizer are
needed while a denoiser trains, and nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Float16, Int, Int16, UInt8
from torch import Tensor
from transformers import CLIPTokenizer

from twostep.diffusion.shapes import sent
from twostep.evaluate.attributes import Concept
from twostep.media.codec import Codec
from twostep.models.bundle import Bundle
from twostep.models.sdxl import text_encoders
from twostep.networks.conditioning import Conditioning, image_sizes
from twostep.pretrain.art_of_sizes import find_drawings
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.progress import OnDone, untold
from twostep.pretrain.scene_captions import caption_table
from twostep.pretrain.scenes import SceneTable, compose, random_scenes
from twostep.pretrain.sizes import find_size
from twostep.text.clip import TextEncoders
from twostep.training.cpu import num_cores
from twostep.training.device import computes_bfloat16
from twostep.training.loop import hashed_seed

_AT_ONCE = 64
"""Scenes that are composed and encoded together: a quarter of a gigabyte at 256 pixels."""

_CAPTIONED_AT_ONCE = 4096
"""Scenes that share a random generator of captions, and that one process captions at a time."""

_MOST_PROCESSES = 16


@dataclass(frozen=True, eq=False)
class EncodedScenes:
    """Latents of scenes and tokens of their captions, on one device.

    Attributes:
        latents: of the pictures, in half precision.
        tokens: of several captions of each, which often say less than there is.
        table: what is on each.
    """

    latents: Float16[Tensor, "scenes c h w"]
    tokens: Int16[Tensor, "scenes captions tokens"]
    table: SceneTable

    @property
    def device(self) -> torch.device:
        """Where all of this lies."""
        return self.latents.device

    def choose(
        self, count: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, " count"], Int[Tensor, "count tokens"]]:
        """Return the numbers of random scenes, on the device, and the tokens of a caption of each.

        Args:
            count: how many.
            generator: of the CPU.
        """
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        columns = torch.randint(self.tokens.shape[1], (count,), generator=generator)
        here = sent(rows, self.device)
        return here, self.tokens[here, sent(columns, self.device)].long()

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "count c h w"], Int[Tensor, "count tokens"]]:
        """Return random latents and the tokens of a caption of each; arguments as of `choose`."""
        rows, tokens = self.choose(count, generator)
        return self.latents[rows].float(), tokens


def make_encoded_scenes(
    drawings: DrawingSet,
    codec: Codec,
    tokenizer: CLIPTokenizer,
    *,
    pixels: int,
    count: int,
    captions: int,
    seed: int,
    device: torch.device,
    on_scene: OnDone = untold,
) -> EncodedScenes:
    """Lay out, caption, compose and encode random scenes.

    Args:
        drawings: of which they are composed.
        codec: encodes them, on the device.
        tokenizer: of the captions.
        pixels: side of the pictures.
        count: scenes.
        captions: captions of each scene.
        seed: of scenes and captions.
        device: where everything is computed and kept.
        on_scene: called with the number of scenes that are encoded, and of all.
    """
    table = random_scenes(len(drawings.concepts), len(drawings.styles), count=count, seed=seed)
    tokens = caption_scenes(table, drawings.concepts, tokenizer, captions=captions, seed=seed)
    table = table.to(device)
    art = drawings.drawings.to(device)
    latents = encode_scenes(table, art, codec, pixels=pixels, on_scene=on_scene)
    return EncodedScenes(latents, tokens.to(device), table)


@torch.no_grad()
def encode_scenes(
    table: SceneTable,
    drawings: UInt8[Tensor, "concepts styles 4 side side"],
    codec: Codec,
    *,
    pixels: int,
    on_scene: OnDone = untold,
) -> Float16[Tensor, "scenes c h w"]:
    """Compose all scenes of a table and return their latents; everything lies on one device."""
    device_type = drawings.device.type
    latents = []
    for start in range(0, len(table), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        pictures = compose(table.rows(rows), drawings, pixels)
        with torch.autocast(device_type, torch.bfloat16, enabled=computes_bfloat16(device_type)):
            latents.append(codec.encode(pictures).half())
        on_scene(min(start + _AT_ONCE, len(table)), len(table))
    return torch.cat(latents)


def caption_scenes(
    table: SceneTable,
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    *,
    captions: int,
    seed: int,
) -> Int16[Tensor, "scenes captions tokens"]:
    """Return tokens of several captions of every scene, written by as many processes as help.

    The captions do not depend on how many there are.
    """
    starts = range(0, len(table), _CAPTIONED_AT_ONCE)
    parts = [table.rows(slice(start, start + _CAPTIONED_AT_ONCE)) for start in starts]
    seeds = [hashed_seed(seed, "captions", start) for start in starts]
    write = partial(_captioned, concepts=concepts, tokenizer=tokenizer, captions=captions)
    num_processes = min(num_cores(), len(parts), _MOST_PROCESSES)
    if num_processes < 3:
        # To start two takes longer than they save.
        return torch.cat(list(map(write, parts, seeds)))
    # Processes that were forked could not use a GPU that this one uses already.
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        return torch.cat(list(pool.map(write, parts, seeds)))


def _captioned(
    table: SceneTable,
    seed: int,
    *,
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    captions: int,
) -> Int16[Tensor, "scenes captions tokens"]:
    return caption_table(table, concepts, tokenizer, captions_per_scene=captions, seed=seed)


@dataclass(frozen=True, eq=False)
class SceneSource:
    """Scenes for distillation, made at the first draw on the device where the teacher is then.

    Attributes:
        teacher: whose codec, tokenizer and text encoders are used.
        drawings: loads what the scenes are composed of.
        count: scenes.
        captions: captions of each scene.
        seed: of the scenes.
        advance: called with what is done, of how many, and a word on it.
    """

    teacher: Bundle
    drawings: Callable[[], DrawingSet]
    count: int
    captions: int
    seed: int
    advance: Callable[[int, int | None, str], None]

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Tensor, Conditioning]:
        """Return random latents and the conditioning of a caption of each, on the device."""
        x0, tokens = self._encoded.draw(count, tensors)
        text, pooled = self._text.encode_tokens(tokens, tokens)
        return x0, Conditioning(text, pooled, self._sizes.expand(count, -1))

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items as `like` has."""
        return self._empty.expand(len(like))

    @property
    def _text(self) -> TextEncoders:
        return text_encoders(self.teacher)

    @cached_property
    def _encoded(self) -> EncodedScenes:
        return make_encoded_scenes(
            self.drawings(),
            self.teacher.codec,
            self._text.tokenizers[0],
            pixels=self.teacher.contract.sizes[0][0],
            count=self.count,
            captions=self.captions,
            seed=self.seed,
            device=self.teacher.denoiser.device,
            on_scene=lambda done, total: self.advance(done, total, "scenes"),
        )

    @cached_property
    def _sizes(self) -> Float[Tensor, "1 6"]:
        width, height = self.teacher.contract.sizes[0]
        return image_sizes(1, width, height).to(self.teacher.denoiser.device)

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            empty = self._text.conditioning([""], *self.teacher.contract.sizes[0])
        return empty.to(self.teacher.denoiser.device)


def scenes(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    count: int = 100_000,
    captions: int = 3,
    seed: int = 1,
    size: str = "mini",
    drawings: str = "",
) -> SceneSource:
    """Return scenes as the teacher's latents: `data` in the recipes of mini.

    Args:
        teacher: whose codec and text encoders are used.
        out: the run's folder; nothing is kept there.
        advance: called with what is done, of how many, and a word on it.
        count: scenes.
        captions: captions of each scene.
        seed: of the scenes.
        size: the built-in size whose drawings are taken.
        drawings: a folder of drawings to take instead.
    """
    folder = Path(drawings) if drawings else None
    load = partial(find_drawings, find_size(size), folder)
    return SceneSource(teacher, load, count, captions, seed, advance)
