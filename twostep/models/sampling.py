"""Sampling: the one way from prompts and seeds to media.

Prompts are encoded, noise is drawn by seed, guidance is applied, the flow is followed along falling
times, and the codec decodes. Everything that draws calls these functions: the pipeline, sample
sheets of a run, caches, verification and benchmarks. They know no requests, files or progress bars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from twostep.contract import Contract
from twostep.diffusion import (
    Denoise,
    Schedule,
    falling_times,
    find_sampler,
    initial_noise,
    seeded_noise,
)
from twostep.diffusion.flow import Keep, OnStep
from twostep.diffusion.grid import time_tensor
from twostep.diffusion.samplers import Sampler
from twostep.diffusion.shapes import Batch, Time
from twostep.media.codec import Codec
from twostep.media.tiles import decode_in_tiles
from twostep.models.bundle import Bundle
from twostep.models.runtime import say
from twostep.models.shortage import MemoryShortageError, if_it_fits
from twostep.networks.conditioning import Conditioning
from twostep.networks.control import Hint
from twostep.networks.denoiser import Denoiser

_LEAST_TILE = 8
"""Latents along the side of the smallest tile that pictures are decoded in."""


@dataclass(frozen=True, eq=False)
class Guided:
    """What is to be drawn and what is to be avoided, encoded.

    Args:
        positive: What is to be drawn, one item for each picture.
        negative: What is to be avoided: as many items, or one for all; None without guidance.
        scale: The guidance scale; 1 is none.
    """

    positive: Conditioning
    negative: Conditioning | None = None
    scale: float = 1.0

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.positive)

    def __getitem__(self, index: slice) -> Guided:
        """Select items; a negative for all items stays."""
        negative = self.negative
        if negative is not None and len(negative) == len(self):
            negative = negative[index]
        return replace(self, positive=self.positive[index], negative=negative)

    @staticmethod
    def cat(parts: Sequence[Guided]) -> Guided:
        """Join batches of the same scale, one after the other."""
        if len(parts) == 1:
            return parts[0]
        negatives = [part.matched_negative for part in parts]
        known = [negative for negative in negatives if negative is not None]
        return Guided(
            positive=Conditioning.cat([part.positive for part in parts]),
            negative=Conditioning.cat(known) if known else None,
            scale=parts[0].scale,
        )

    def expand(self, count: int) -> Guided:
        """Repeat a single item `count` times."""
        negative = None if self.negative is None else self.negative.expand(count)
        return replace(self, positive=self.positive.expand(count), negative=negative)

    def shown(self, known: Tensor | None, hints: tuple[Hint, ...]) -> Guided:
        """Return the same with known parts and ControlNets, which both conditionings are given."""
        negative = self.matched_negative
        if negative is not None:
            negative = replace(negative, known=known, hints=hints)
        return replace(
            self, positive=replace(self.positive, known=known, hints=hints), negative=negative
        )

    @property
    def matched_negative(self) -> Conditioning | None:
        """The negative with as many items as the positive."""
        if self.negative is None or len(self.negative) == len(self):
            return self.negative
        return self.negative.expand(len(self))

    def denoise(self, denoiser: Denoiser) -> Denoise:
        """Return the function (x_t, t) -> Prediction of a denoiser under this guidance."""
        negative = self.matched_negative
        if negative is None:
            return denoiser.with_conditioning(self.positive)
        return denoiser.with_guidance(self.positive, negative, self.scale)


@dataclass(frozen=True, eq=False)
class AllSteps:
    """What an engine returns that runs all steps of a drawing together.

    Args:
        latents: At the last time.
        pictures: Of the latents, where they were decoded too; in -1..1.
    """

    latents: Tensor
    pictures: Tensor | None = None


def encode_prompts(
    bundle: Bundle,
    prompts: Sequence[str],
    size: tuple[int, int],
    *,
    negative_prompt: str = "",
    scale: float | None = None,
    whole: bool = False,
) -> Guided:
    """Encode prompts, and with guidance also what is to be avoided.

    Args:
        bundle: The model whose text encoders are used.
        prompts: One for each picture.
        size: (width, height) in pixels.
        negative_prompt: What is to be avoided in all of them.
        scale: The guidance scale; None is the contract's.
        whole: Whether weights in prompts count and long prompts are not cut off.
    """
    scale = bundle.contract.guidance if scale is None else scale
    # Together, for prompts of different lengths are filled up to the longest.
    texts = list(prompts) if scale == 1 else [*prompts, negative_prompt]
    encoded = bundle.conditioning(texts, *size, whole=whole)
    if scale == 1:
        return Guided(encoded)
    return Guided(encoded[: len(prompts)], encoded[len(prompts) :], scale)


def draw_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | None = None
) -> Batch:
    """Draw the noise that each seed starts from, [seeds, *shape], the same on every device."""
    noise = torch.stack([initial_noise(seed, tuple(shape)) for seed in seeds])
    return noise if device is None else noise.to(device)


def sampling_times(
    contract: Contract, schedule: Schedule, *, steps: int | None = None, start: Time | None = None
) -> tuple[Time, ...]:
    """Return the falling times that a model visits, the landing 0 included.

    Args:
        contract: Says at which times the model is sampled.
        schedule: Whose times they are.
        steps: Of a teacher's grid; None is the contract's number.
        start: Where an image is begun; None begins at pure noise.
    """
    if not contract.sampling_times:
        first = schedule.top if start is None else start
        return falling_times(first, steps or contract.steps, schedule)
    if start is None:
        return (*contract.sampling_times, 0)
    return (start, *[t for t in contract.sampling_times if t < start], 0)


def sample_latents(
    denoiser: Denoiser,
    guided: Guided,
    x: Batch,
    times: Sequence[Time] | int,
    seeds: Sequence[int],
    *,
    sampler: str | Sampler = "euler",
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Follow the flow from latents at the first time to latents at the last.

    Args:
        denoiser: What predicts.
        guided: What is to be drawn and avoided.
        x: Latents at the first time [batch, ...], on the network's device; noise at the top.
        times: Falling times, the landing included; or a number of steps from noise to clean.
        seeds: One per item, for samplers that add noise on the way.
        sampler: The name of a sampler, as contracts have it, or one itself.
        on_step: Called after every network call.
        keep: Puts known parts back after every step, as inpainting does.

    Returns:
        The latents at the last time.

    Raises:
        SamplerError: The sampler's name is not known.
        FlowError: The times do not fall.
    """
    schedule = denoiser.schedule
    if isinstance(times, int):
        times = falling_times(schedule.top, times, schedule)
    columns = time_tensor(times)[:, None].expand(-1, len(x))
    follow = find_sampler(sampler) if isinstance(sampler, str) else sampler
    return follow(
        guided.denoise(denoiser),
        x,
        columns,
        schedule,
        seeded_noise(seeds, x),
        on_step=on_step,
        keep=keep,
    )


def sample_prompts(
    bundle: Bundle,
    guided: Guided,
    seeds: Sequence[int],
    size: tuple[int, int],
    *,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    on_step: OnStep | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Draw latents from pure noise, one for each item of `guided`, without gradients.

    Args:
        bundle: The model.
        guided: What is to be drawn, from `encode_prompts`.
        seeds: One per item.
        size: (width, height) in pixels.
        steps: Network calls; None is the contract's number.
        sampler: A sampler or its name; None is the contract's.
        on_step: Called after every network call.
        keep: Called with the latents of every point, as in `sample_latents`.
    """
    contract = bundle.contract
    noise = draw_noise(seeds, bundle.latent_shape(*size), bundle.denoiser.device)
    with torch.no_grad():
        return sample_latents(
            bundle.denoiser,
            guided,
            noise,
            times=sampling_times(contract, bundle.denoiser.schedule, steps=steps),
            seeds=seeds,
            sampler=sampler or contract.sampler,
            on_step=on_step,
            keep=keep,
        )


def pictures_of(bundle: Bundle, latents: Batch, *, at_once: int | None = None) -> Tensor:
    """Return pictures of latents in -1..1; of other media, what their codec previews."""
    if bundle.codec.media == "image":
        return decode(bundle, latents, at_once=at_once)
    return bundle.codec.preview(latents)


def decode(bundle: Bundle, latents: Batch, *, at_once: int | None = None) -> Tensor:
    """Decode latents to media, all together or so many at once, which takes less memory.

    Where memory runs out, items are decoded one by one, and pictures in tiles, with a word. Raises
    MemoryShortageError where that is too much as well.
    """
    parts = latents.split(at_once or len(latents))
    return torch.cat([_decoded(bundle.codec, part) for part in parts])


def _decoded(codec: Codec, latents: Batch) -> Tensor:
    """Decode latents in the largest pieces for which there is memory."""
    decoded = if_it_fits(partial(codec.decode, latents))
    if decoded is None and len(latents) > 1:
        decoded = if_it_fits(partial(_one_by_one, codec.decode, latents))
    if decoded is not None:
        return decoded
    longest = max(latents.shape[2:], default=0)
    is_picture = codec.media == "image" and latents.ndim == 4
    for side in (longest // 2, longest // 4, longest // 8):
        if not is_picture or side < _LEAST_TILE:
            break
        in_tiles = partial(decode_in_tiles, codec.decode, side=side)
        decoded = if_it_fits(partial(_one_by_one, in_tiles, latents))
        if decoded is not None:
            say(
                "there was not enough memory to decode a whole picture, so it was done in tiles "
                f"of {side * decoded.shape[-1] // latents.shape[-1]} pixels: colours may differ "
                "a little from tile to tile."
            )
            return decoded
    raise MemoryShortageError("there is not enough memory to decode the picture, nor tiles of it.")


def _one_by_one(compute: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    return torch.cat([compute(item) for item in latents.split(1)])
