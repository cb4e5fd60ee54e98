"""Fills a cache: a user's pictures encoded, or latents that the teacher makes of prompts alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twostep.data.cache import CacheWriter, OnItem
from twostep.data.sources import DataError, Demands, Entry, UnusablePictureError, cut, read_picture
from twostep.diffusion import initial_noise, sample
from twostep.models.bundle import Bundle
from twostep.networks.conditioning import Conditioning


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
    """Encode pictures and captions into `folder`; the same call goes on where a killed one stopped.

    Raises DataError if the folder was made by another autoencoder, other text encoders or with
    other sizes, or if no picture at all could be used.
    """
    made_by = {"kind": "pictures", "sizes": [list(size) for size in sizes]}
    writer = CacheWriter(bundle, folder, made_by, on_item)
    waiting: dict[tuple[int, int], list[tuple[str, str, Tensor, tuple[int, ...]]]] = {}
    for entry in entries:
        if entry.name in writer.known:
            continue
        try:
            pixels, told = cut(read_picture(entry, demands or Demands()), sizes)
        except UnusablePictureError as error:
            writer.skip(entry.name, str(error))
            continue
        size = (pixels.shape[2], pixels.shape[1])
        waiting.setdefault(size, []).append((entry.name, str(entry.caption), pixels, told))
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
    """Let the teacher make the latents of every prompt, `per_prompt` of each, where a user has no
    pictures.

    Steps and guidance are the contract's if not given. Picture number k comes from the noise of
    seed k.
    """
    if not any(prompt.strip() for prompt in prompts):
        raise DataError("There are no prompts: give a text file with one on every line.")
    steps, guidance = steps or bundle.contract.steps, guidance or bundle.contract.guidance
    width, height = bundle.contract.sizes[0]
    made_by = {"kind": "prompts", "sizes": [[width, height]], "steps": steps, "guidance": guidance}
    writer = CacheWriter(bundle, folder, made_by, on_item)
    wanted = [(k, prompts[k // per_prompt].strip()) for k in range(len(prompts) * per_prompt)]
    named = {f"{k:06d} {prompt}": (k, prompt) for k, prompt in wanted if prompt}
    missing = [name for name in named if name not in writer.known]
    for start in range(0, len(missing), batch_size):
        names = missing[start : start + batch_size]
        seeds, asked = zip(*(named[name] for name in names), strict=True)
        noise = torch.stack(
            [initial_noise(seed, bundle.latent_shape(width, height)) for seed in seeds]
        )
        with torch.no_grad():
            conditioning = bundle.conditioning(asked, width, height)
            empty = bundle.conditioning([""], width, height).expand(len(names))
            denoise = bundle.denoiser.with_guidance(conditioning, empty, guidance)
            latents = sample(denoise, noise, steps, bundle.denoiser.schedule)
        writer.add(names, latents, conditioning)
    return writer.close()


@torch.no_grad()
def _encode(
    batch: list[tuple[str, str, Tensor, tuple[int, ...]]], bundle: Bundle, writer: CacheWriter
) -> None:
    names, captions, pixels, told = zip(*batch, strict=True)
    latents = bundle.codec.encode(torch.stack(pixels))
    text, pooled = bundle.text.encode(captions)
    writer.add(names, latents, Conditioning(text, pooled, torch.tensor(told, dtype=torch.float32)))
