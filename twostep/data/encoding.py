"""Filling a cache: with a user's pictures, encoded, or with latents that the teacher makes of
prompts alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.data.cache import CacheWriter, OnItem
from twostep.data.sources import DataError, Demands, Entry, read_picture
from twostep.media.pictures import UnusablePictureError, crop_to_size
from twostep.models.bundle import Bundle
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.networks.conditioning import Conditioning


@dataclass(frozen=True, eq=False)
class _CutPicture:
    """A picture that waits to be encoded: pixels in -1..1 and SDXL's six micro-conditions."""

    name: str
    caption: str
    pixels: Float[Tensor, "3 height width"]
    sizes: tuple[int, ...]


def cache_pictures(
    entries: Iterable[Entry],
    bundle: Bundle,
    folder: Path,
    *,
    sizes: Sequence[tuple[int, int]],
    demands: Demands | None = None,
    batch_size: int = 8,
    on_item: OnItem = lambda done, skipped: None,
) -> CacheWriter:
    """Encode pictures and captions into a cache; the same call goes on where a killed one stopped.

    Args:
        entries: the pictures, as of `find_entries`.
        bundle: whose autoencoder and text encoders are used.
        folder: of the cache.
        sizes: (width, height) in pixels; every picture is cut to the one nearest to it in shape.
        demands: what a picture must be; others are skipped by name.
        batch_size: pictures that are encoded at once.
        on_item: called after every item with how many are done, and how many of them skipped.

    Raises:
        DataError: the folder was made by another autoencoder, other text encoders or with other
            sizes, or no picture at all could be used.
    """
    made_by = {"kind": "pictures", "sizes": [list(size) for size in sizes]}
    writer = CacheWriter(bundle, folder, made_by, on_item)
    waiting: dict[tuple[int, int], list[_CutPicture]] = {}
    for entry in entries:
        if entry.name in writer.known:
            continue
        try:
            picture = read_picture(entry, demands or Demands())
        except UnusablePictureError as error:
            writer.skip(entry.name, str(error))
            continue
        pixels, micro_conditions = crop_to_size(picture, sizes)
        size = (pixels.shape[2], pixels.shape[1])
        cut_picture = _CutPicture(entry.name, str(entry.caption), pixels, micro_conditions)
        waiting.setdefault(size, []).append(cut_picture)
        if len(waiting[size]) == batch_size:
            _encode(waiting.pop(size), bundle, writer)
    for batch in waiting.values():
        _encode(batch, bundle, writer)
    return writer.close()


def cache_prompts(
    prompts: Sequence[str],
    bundle: Bundle,
    folder: Path,
    *,
    per_prompt: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 8,
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
        on_item: called after every item with how many are done, and how many of them skipped.

    Raises:
        DataError: there are no prompts, or the folder was made with other settings.
    """
    if not any(prompt.strip() for prompt in prompts):
        raise DataError("There are no prompts: give a text file with one on every line.")
    steps = steps or bundle.contract.steps
    guidance = guidance or bundle.contract.guidance
    width, height = bundle.contract.sizes[0]
    made_by = {"kind": "prompts", "sizes": [[width, height]], "steps": steps, "guidance": guidance}
    writer = CacheWriter(bundle, folder, made_by, on_item)
    wishes = _numbered(prompts, per_prompt)
    missing = [name for name in wishes if name not in writer.known]
    for start in range(0, len(missing), batch_size):
        names = missing[start : start + batch_size]
        seeds = [wishes[name][0] for name in names]
        texts = [wishes[name][1] for name in names]
        latents, conditioning = _draw(bundle, texts, seeds, steps=steps, guidance=guidance)
        writer.add(names, latents, conditioning)
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
def _encode(batch: Sequence[_CutPicture], bundle: Bundle, writer: CacheWriter) -> None:
    """Encode pictures of one size with their captions, and cache them."""
    latents = bundle.codec.encode(torch.stack([picture.pixels for picture in batch]))
    text, pooled = bundle.text.encode([picture.caption for picture in batch])
    sizes = torch.tensor([picture.sizes for picture in batch], dtype=torch.float32)
    names = [picture.name for picture in batch]
    writer.add(names, latents, Conditioning(text, pooled, sizes))
