"""Filling a cache: with a user's pictures, encoded, or with latents that the teacher makes of
prompts alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from typing_extensions import Protocol, runtime_checkable

from twostep.data.cache import CacheWriter, Item, OnItem
from twostep.data.sources import DataError, Demands, Entry, read_picture
from twostep.files import alone_in
from twostep.media.pictures import UnusablePictureError, crop_to_size
from twostep.models.bundle import Bundle, modules_of
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.networks.conditioning import Conditioning
from twostep.training.device import drawing_dtype

_DRAWN = "drawn"
"""The fingerprint of pictures that the teacher draws: their names say all that they depend on."""

_MAX_READERS = 8
"""Threads that read and cut pictures while others are encoded."""


@dataclass(frozen=True)
class Variants:
    """What is made of every picture, beside its first caption.

    Variants of a picture share its weight.

    Attributes:
        flips: whether to cache it mirrored too.
        shuffles: how many orders of a caption's parts, between its commas, are cached.
        kept_parts: parts at the beginning that stay where they are.
    """

    flips: bool = False
    shuffles: int = 1
    kept_parts: int = 1

    def captions(self, entry: Entry) -> list[str]:
        """Return the captions of an entry in every order, each once."""
        found: dict[str, None] = {}
        for caption in entry.captions:
            found[caption] = None
            parts = [part.strip() for part in caption.split(",")]
            fixed, loose = parts[: self.kept_parts], parts[self.kept_parts :]
            for number in range(1, self.shuffles):
                order = random.Random(f"{entry.name}/{number}").sample(loose, len(loose))
                found[", ".join([*fixed, *order])] = None
        return list(found)


@runtime_checkable
class _CutsCaptions(Protocol):
    """Text encoders that can tell which captions are too long for them."""

    def is_cut(self, prompt: str) -> bool:
        """Return whether `encode` leaves out the end of a prompt."""


@dataclass(frozen=True, eq=False)
class _Wanted:
    """An item that is to be encoded: pixels in -1..1 and SDXL's six micro-conditions."""

    item: Item
    caption: str
    pixels: Float[Tensor, "3 height width"]
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Looked:
    """What came of looking at an entry: items that are there, items to make, or a reason."""

    name: str
    current: list[Item]
    wanted: list[_Wanted]
    problem: str | None = None


def cache_pictures(
    entries: Iterable[Entry],
    bundle: Bundle,
    folder: Path,
    *,
    sizes: Sequence[tuple[int, int]],
    demands: Demands | None = None,
    variants: Variants | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    redo: bool = False,
    keep_others: bool = False,
    on_item: OnItem = lambda done, skipped: None,
) -> CacheWriter:
    """Encode pictures and captions into a cache; the same call goes on where a killed one stopped.

    What changed since is made anew, and what the entries do not have any more is dropped.

    Args:
        entries: the pictures, as of `find_entries`.
        bundle: whose autoencoder and text encoders are used.
        folder: of the cache.
        sizes: (width, height) in pixels; every picture is cut to the one nearest to it in shape.
        demands: what a picture must be; others are skipped by name.
        variants: what else is made of every picture.
        batch_size: pictures that are encoded at once.
        device: where they are encoded, in 16 bits on an accelerator; None leaves the networks as
            they are.
        redo: whether to delete what is there, and begin anew.
        keep_others: whether what the entries do not have stays.
        on_item: called after every item with how many are done, and how many of them skipped.

    Raises:
        DataError: the folder was made by another autoencoder, other text encoders or with other
            sizes, or no picture at all could be used.
        WriteError: another process is at work in the folder, or it cannot be written.
    """
    with alone_in(folder):
        made_by = {"kind": "pictures", "sizes": [list(size) for size in sizes]}
        writer = CacheWriter(bundle, folder, made_by, on_item, redo=redo, keep_others=keep_others)
        if device is not None:
            for network in (*bundle.text.networks.values(), *modules_of(bundle.codec)):
                nn.Module.to(network, device, drawing_dtype(device))
        look = _Looker(writer, sizes, demands or Demands(), variants or Variants())
        waiting: dict[tuple[int, int], list[_Wanted]] = {}
        for looked in _in_threads(look, entries, ahead=2 * batch_size):
            if looked.problem is not None:
                writer.skip(looked.name, looked.problem)
            for item in looked.current:
                writer.keep(item)
            for wanted in looked.wanted:
                size = (wanted.pixels.shape[2], wanted.pixels.shape[1])
                waiting.setdefault(size, []).append(wanted)
                if len(waiting[size]) == batch_size:
                    _encode(waiting.pop(size), bundle, writer)
        for batch in waiting.values():
            _encode(batch, bundle, writer)
        return writer.close()


@dataclass(frozen=True, eq=False)
class _Looker:
    """Looks at entries: what of them is cached already, and what is to be encoded."""

    writer: CacheWriter
    sizes: Sequence[tuple[int, int]]
    demands: Demands
    variants: Variants

    def __call__(self, entry: Entry) -> _Looked:
        """Read one entry and cut it, unless all that is made of it is there."""
        try:
            return self._look(entry)
        except UnusablePictureError as error:
            return _Looked(entry.name, [], [], str(error))

    def _look(self, entry: Entry) -> _Looked:
        if entry.problem is not None or not entry.captions:
            read_picture(entry, self.demands)
        try:
            content = entry.read()
        except (OSError, ValueError) as error:
            raise UnusablePictureError(f"it cannot be read ({error})") from error
        captions = self.variants.captions(entry)
        mirrored = (False, True) if self.variants.flips else (False,)
        weight = entry.weight / (len(captions) * len(mirrored))
        current: list[Item] = []
        missing: list[tuple[Item, str, bool]] = []
        for is_flipped in mirrored:
            for number, caption in enumerate(captions, start=1):
                name = entry.name if number == 1 else f"{entry.name} [caption {number}]"
                name = f"{name} [flipped]" if is_flipped else name
                item = Item(name, _fingerprint(content, caption, is_flipped), weight)
                if self.writer.is_current(item):
                    current.append(item)
                else:
                    missing.append((item, caption, is_flipped))
        if not missing:
            return _Looked(entry.name, current, [])
        picture = read_picture(replace(entry, read=lambda: content), self.demands)
        pixels, micro_conditions = crop_to_size(picture, self.sizes)
        wanted = [
            _Wanted(item, caption, pixels.flip(2) if is_flipped else pixels, micro_conditions)
            for item, caption, is_flipped in missing
        ]
        return _Looked(entry.name, current, wanted)


def count_cut(bundle: Bundle, captions: Iterable[str]) -> int:
    """Return how many captions are too long for the text encoders, and are cut off."""
    text = bundle.text
    if not isinstance(text, _CutsCaptions):
        return 0
    return sum(map(text.is_cut, captions))


def _fingerprint(content: bytes | Image.Image, caption: str, is_flipped: bool) -> str:
    """Return 16 hex digits of all that an item is made from, beside what all items share."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        digest.update(f"{content.mode} {content.size}".encode())
        digest.update(content.tobytes())
    digest.update(json.dumps([caption, is_flipped]).encode())
    return digest.hexdigest()


def _in_threads(
    look: Callable[[Entry], _Looked], entries: Iterable[Entry], *, ahead: int
) -> Iterator[_Looked]:
    """Look at entries in threads, some ahead of the one that is due, and yield in their order."""
    with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as threads:
        looking: deque[Future[_Looked]] = deque()
        for entry in entries:
            looking.append(threads.submit(look, entry))
            if len(looking) > ahead:
                yield looking.popleft().result()
        while looking:
            yield looking.popleft().result()


def cache_prompts(
    prompts: Sequence[str],
    bundle: Bundle,
    folder: Path,
    *,
    per_prompt: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    redo: bool = False,
    keep_others: bool = False,
    on_item: OnItem = lambda done, skipped: None,
) -> CacheWriter:
    """Let the teacher make the latents of prompts, where a user has no pictures.

    Picture number k comes from the noise of seed k.

    Args:
        prompts: what to draw; empty ones are left out.
        bundle: the teacher.
        folder: of the cache.
        per_prompt: pictures of each prompt.
        steps: of the teacher; its contract's if not given.
        guidance: of the teacher; its contract's if not given.
        batch_size: pictures that are drawn at once.
        device: where they are drawn, in 16 bits on an accelerator; None leaves the networks as they
            are.
        redo: whether to delete what is there, and begin anew.
        keep_others: whether pictures of other prompts stay.
        on_item: called after every item with how many are done, and how many of them skipped.

    Raises:
        DataError: there are no prompts, or the folder was made with other settings.
        WriteError: another process is at work in the folder, or it cannot be written.
    """
    if not any(prompt.strip() for prompt in prompts):
        raise DataError("There are no prompts: give a text file with one on every line.")
    steps = steps or bundle.contract.steps
    guidance = guidance or bundle.contract.guidance
    width, height = bundle.contract.sizes[0]
    with alone_in(folder):
        made_by = {
            "kind": "prompts",
            "sizes": [[width, height]],
            "steps": steps,
            "guidance": guidance,
        }
        writer = CacheWriter(bundle, folder, made_by, on_item, redo=redo, keep_others=keep_others)
        if device is not None:
            bundle.to(device, drawing_dtype(device))
        wishes = _numbered(prompts, per_prompt)
        missing = []
        for name in wishes:
            item = Item(name, _DRAWN)
            if writer.is_current(item):
                writer.keep(item)
            else:
                missing.append(name)
        for start in range(0, len(missing), batch_size):
            names = missing[start : start + batch_size]
            seeds = [wishes[name][0] for name in names]
            texts = [wishes[name][1] for name in names]
            latents, conditioning = _draw(bundle, texts, seeds, steps=steps, guidance=guidance)
            writer.add([Item(name, _DRAWN) for name in names], latents, conditioning)
        return writer.close()


def _numbered(prompts: Sequence[str], per_prompt: int) -> dict[str, tuple[int, str]]:
    """Return name -> (seed, prompt) of every picture to be drawn."""
    wishes = {}
    for seed in range(len(prompts) * per_prompt):
        prompt = prompts[seed // per_prompt].strip()
        if prompt:
            wishes[f"{seed:06d} {prompt}"] = (seed, prompt)
    return wishes


@torch.no_grad()
def _draw(
    bundle: Bundle, prompts: Sequence[str], seeds: Sequence[int], *, steps: int, guidance: float
) -> tuple[Float[Tensor, "n c h w"], Conditioning]:
    """Let the teacher make one batch; return latents and the conditioning of their prompts."""
    size = bundle.contract.sizes[0]
    guided = encode_prompts(bundle, prompts, size, scale=guidance)
    return sample_prompts(bundle, guided, seeds, size, steps=steps), guided.positive


@torch.no_grad()
def _encode(batch: Sequence[_Wanted], bundle: Bundle, writer: CacheWriter) -> None:
    """Encode pictures of one size with their captions, and cache them."""
    device = next(iter(modules_of(bundle.codec)[0].parameters())).device
    pixels = torch.stack([wanted.pixels for wanted in batch]).to(device)
    latents = bundle.codec.encode(pixels)
    text, pooled = bundle.text.encode([wanted.caption for wanted in batch])
    sizes = torch.tensor([wanted.sizes for wanted in batch], dtype=torch.float32)
    writer.add(
        [wanted.item for wanted in batch],
        latents,
        Conditioning(text, pooled, sizes),
    )
