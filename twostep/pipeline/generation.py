"""From requests to pictures.

Each image starts from the noise of its own seed, the flow is followed along the trailing grid of
the contract, and the codec turns latents into pixels. A student is sampled by the same lines as its
teacher, with fewer times. This module keeps no state between two calls, and knows nothing of files,
servers or progress bars.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twostep.diffusion import Prediction
from twostep.errors import TwostepError
from twostep.media.codec import Codec, Encoded
from twostep.media.image import ImageCodec, to_images
from twostep.media.png import png_file
from twostep.models.bundle import Bundle
from twostep.models.runtime import take_notes
from twostep.models.sampling import Guided, decode, sample_latents
from twostep.models.shortage import if_it_fits
from twostep.pipeline.batching import ExactBatch
from twostep.pipeline.fitting import shortage
from twostep.pipeline.prepare import Prepared, prepare
from twostep.pipeline.request import MAX_BATCH, ModelTraits, Request, Result
from twostep.pipeline.timing import timed
from twostep.text.clip import TextEncoders
from twostep.text.prompt_weights import without_weights


class GenerationError(TwostepError):
    """The model gave something that is not a picture."""


@dataclass(frozen=True, eq=False)
class Progress:
    """One step taken.

    Args:
        num_done: steps of the whole request so far, this one too.
        num_steps: of the whole request.
        seeds: of the images that took it.
        previews: returns these images as they are foreseen now, as small pictures.
        prediction: `x0` holds the latents [batch, ...] of the items as they are foreseen now. None
            where they were drawn elsewhere, or an engine takes all steps in one.
    """

    num_done: int
    num_steps: int
    seeds: list[int]
    previews: Callable[[], list[Image.Image]]
    prediction: Prediction | None = None


OnStep = Callable[[Progress], None]
"""Called after every step of a request. What it raises ends the drawing."""

OnStepOf = Callable[[int, Progress], None]
"""The same for several requests; the number is the place of the request."""

OnAnswerOf = Callable[[int, "Result | TwostepError"], None]
"""Called with the place of a request and what came of it, as soon as that is there."""


def generate(bundle: Bundle, request: Request | str, *, on_step: OnStep | None = None) -> Result:
    """Draw the images of a request, or one image of a prompt, with a model.

    Image i depends on the model and on seed + i alone, not on how many others are drawn with it, to
    rounding. What the contract cannot honour raises `ContractError`, what it ignores becomes a
    warning; NaN or infinity out of the network raises `GenerationError`. `on_step` is called after
    every step; what it raises ends the drawing. Several threads may draw with one bundle at once.
    """

    def report(_: int, progress: Progress) -> None:
        if on_step is not None:
            on_step(progress)

    if isinstance(request, str):
        request = Request(request)
    (answer,) = generate_together(bundle, [request], on_step=report)
    if isinstance(answer, TwostepError):
        raise answer
    return answer


def generate_together(
    bundle: Bundle,
    requests: Sequence[Request],
    *,
    on_step: OnStepOf | None = None,
    on_answer: OnAnswerOf | None = None,
) -> list[Result | TwostepError]:
    """Draw several requests with one model, in shared batches where they are alike enough.

    Every request gets the same pixels as from `generate`, and its result, or the error that
    `generate` would raise, stands at its place. `on_step` gets the place of a request and its
    progress, and `on_answer` each result or error once it is there, which of a batch is one after
    the other, for pictures are decoded so. What either raises ends the drawing of all.
    """
    answers: dict[int, Result | TwostepError] = {}

    def answer(place: int, made: Result | TwostepError) -> None:
        answers[place] = made
        if on_answer is not None:
            on_answer(place, made)

    ready: list[_Drawing] = []
    with torch.inference_mode():
        for place, request in enumerate(requests):
            try:
                ready.append(_Drawing(place, prepare(bundle, request)))
            except TwostepError as error:
                answer(place, error)
        for batch in _batches(ready):
            for drawing in _draw(bundle, batch, on_step):
                if drawing.is_finished:
                    answer(drawing.place, drawing.answer(bundle))
    return [answers[place] for place in range(len(requests))]


@dataclass(eq=False)
class _Drawing:
    """A request while it is drawn: what was made of it so far, or the error that ended it."""

    place: int
    prepared: Prepared
    images: dict[int, Any] = field(default_factory=dict)
    num_done: int = 0
    error: TwostepError | None = None

    @property
    def num_steps(self) -> int:
        """Steps of all batches of the request together."""
        num_batches = -(-self.prepared.request.num_images // MAX_BATCH)
        return num_batches * (len(self.prepared.times) - 1)

    @property
    def is_finished(self) -> bool:
        """Whether every image is there, or the error that ended the drawing."""
        return self.error is not None or len(self.images) == len(self.prepared.request.seeds)

    def answer(self, bundle: Bundle) -> Result | TwostepError:
        """Return the result, or the error that ended the drawing."""
        if self.error is not None:
            return self.error
        request = self.prepared.request
        return Result(
            images=[self.images[seed] for seed in request.seeds],
            seeds=request.seeds,
            seconds=self.prepared.seconds,
            warnings=[*self.prepared.warnings, *take_notes()],
            contract=bundle.contract,
            request=request,
            origin=bundle.origin,
            to_file=_to_file(bundle.codec),
            traits=_traits(bundle, request),
        )


@dataclass(frozen=True, eq=False)
class _Part:
    """The images of one request that go through the network together."""

    drawing: _Drawing
    seeds: list[int]


def _batches(drawings: list[_Drawing]) -> list[list[_Part]]:
    """Return batches of at most MAX_BATCH images, of parts that may be drawn together.

    A request is cut into the same parts whatever else is drawn.
    """
    alike: defaultdict[object, list[_Part]] = defaultdict(list)
    for drawing in drawings:
        seeds = drawing.prepared.request.seeds
        for start in range(0, len(seeds), MAX_BATCH):
            part = _Part(drawing, seeds[start : start + MAX_BATCH])
            alike[drawing.prepared.batch_key].append(part)
    batches: list[list[_Part]] = []
    for parts in alike.values():
        batch: list[_Part] = []
        for part in parts:
            if batch and sum(len(each.seeds) for each in (*batch, part)) > MAX_BATCH:
                batches.append(batch)
                batch = []
            batch.append(part)
        batches.append(batch)
    return batches


def _draw(bundle: Bundle, parts: list[_Part], on_step: OnStepOf | None) -> Iterator[_Drawing]:
    """Draw the images of one batch, give them to their requests, and yield these one by one.

    A part with NaN or infinity in it ends its own request alone.
    """
    parts = [part for part in parts if part.drawing.error is None]
    if not parts:
        return
    sizes = [len(part.seeds) for part in parts]
    start = time.perf_counter()
    with nullcontext() if len(parts) == 1 else ExactBatch(sizes):
        drawn = if_it_fits(partial(_drawn, bundle, parts, on_step))
    if drawn is None:
        error = shortage(bundle, parts[0].drawing.prepared.size, sum(sizes))
        for part in parts:
            part.drawing.error = error
            yield part.drawing
        return
    latents = drawn.latents.split(sizes)
    damages = [
        _damage(part, values, "latents") for part, values in zip(parts, latents, strict=True)
    ]
    seconds = time.perf_counter() - start
    for part, values, damage in zip(parts, latents, damages, strict=True):
        part.drawing.error = damage
        part.drawing.prepared.seconds["denoise"] += seconds * len(part.seeds) / sum(sizes)
        if damage is None:
            _decode(bundle, part, values, drawn.pictures)
        yield part.drawing


def _decode(bundle: Bundle, part: _Part, latents: Tensor, pictures: Tensor | None) -> None:
    """Turn the latents of a part into its images.

    Parts are decoded one after the other: a codec in half precision decodes again what overflowed,
    all of the batch, and decoding gains nothing from larger batches.

    Args:
        bundle: What decodes.
        part: Whose images they are.
        latents: Of the part.
        pictures: Those of the latents, if they were decoded with the steps.
    """
    drawing = part.drawing
    with timed(drawing.prepared.seconds, "decode"):
        if pictures is None or not _is_finite(pictures):
            pictures = if_it_fits(partial(decode, bundle, latents))
        if pictures is None:
            drawing.error = shortage(bundle, drawing.prepared.size, len(latents))
            return
        drawing.error = _damage(part, pictures, "pixels")
        if drawing.error is None:
            images = bundle.codec.items(drawing.prepared.finished(pictures))
            drawing.images.update(zip(part.seeds, images, strict=True))


def _traits(bundle: Bundle, request: Request) -> ModelTraits:
    """Return what of a model other programs must be told, where it has CLIP's text encoders."""
    if not isinstance(bundle.text, TextEncoders):
        return ModelTraits(is_inpainting=bundle.is_inpainting)
    prompts = [request.prompt, request.negative_prompt]
    return ModelTraits(
        zeros_for_empty=bundle.text.zeros_for_empty,
        is_inpainting=bundle.is_inpainting,
        is_long=any(map(bundle.text.is_cut, map(without_weights, prompts))),
    )


def _to_file(codec: Codec) -> Callable[[Any, Mapping[str, str]], Encoded]:
    """Return what writes the items of a codec into files.

    For pictures that is a plain function: a method of the codec would keep the autoencoder in
    memory as long as the result.
    """
    return png_file if isinstance(codec, ImageCodec) else codec.file


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What came of the steps.

    Args:
        latents: Of all parts, clean.
        pictures: Those of the latents, where an engine decoded them with the steps.
    """

    latents: Tensor
    pictures: Tensor | None = None


def _drawn(bundle: Bundle, parts: list[_Part], on_step: OnStepOf | None) -> _Drawn:
    """Follow the flow from the noise of every part, or its noised image, to clean latents."""
    schedule = bundle.denoiser.schedule
    prepared = [part.drawing.prepared for part in parts]
    sizes = [len(part.seeds) for part in parts]
    noises = [one.noise(part.seeds) for one, part in zip(prepared, parts, strict=True)]
    beginnings = [
        one.beginning(noise, schedule) for one, noise in zip(prepared, noises, strict=True)
    ]

    def keep(x: Tensor, s: Tensor) -> Tensor:
        pieces = zip(prepared, x.split(sizes), s.split(sizes), noises, strict=True)
        return torch.cat([one.put_back(x, s, noise, schedule) for one, x, s, noise in pieces])

    def taken(part: _Part, x0: Tensor, prediction: Prediction | None) -> None:
        drawing = part.drawing
        drawing.num_done += 1
        if on_step is not None:
            progress = Progress(
                num_done=drawing.num_done,
                num_steps=drawing.num_steps,
                seeds=part.seeds,
                previews=partial(_previews, bundle.codec, x0),
                prediction=prediction,
            )
            on_step(drawing.place, progress)

    def report(_: int, prediction: Prediction) -> None:
        pieces = zip(parts, prediction.x0.split(sizes), prediction.eps.split(sizes), strict=True)
        for part, x0, eps in pieces:
            taken(part, x0, Prediction(x0, eps))

    first = prepared[0]
    guided = Guided.cat(
        [one.guided.expand(size) for one, size in zip(prepared, sizes, strict=True)]
    )
    x = torch.cat(beginnings)
    sampler = first.request.sampler or bundle.contract.sampler
    # An image begins at times of its own, and a graph is made for each row of times.
    if bundle.runtime.run is not None and first.request.image is None:
        together = bundle.runtime.run(guided, x, first.times, sampler)
        if together is not None:
            for _ in first.times[1:]:
                taken(parts[0], together.latents, None)
            return _Drawn(together.latents, together.pictures)
    latents = sample_latents(
        bundle.denoiser,
        guided,
        x,
        times=first.times,
        seeds=[seed for part in parts for seed in part.seeds],
        sampler=sampler,
        on_step=report,
        keep=None if first.mask is None else keep,
    )
    return _Drawn(latents)


def _previews(codec: Codec, latents: Float[Tensor, "batch ..."]) -> list[Image.Image]:
    """Return small pictures of latents."""
    return to_images(codec.preview(latents))


def _damage(part: _Part, values: Float[Tensor, "batch ..."], what: str) -> GenerationError | None:
    """Return an error if an image holds NaN or infinity; this also waits for the device."""
    pairs = zip(part.seeds, values, strict=True)
    broken = [str(seed) for seed, image in pairs if not _is_finite(image)]
    if not broken:
        return None
    return GenerationError(
        f"the {what} of seed(s) {', '.join(broken)} hold NaN or infinity; expected finite numbers. "
        "Either the weights are damaged or half precision overflowed: load the model again, in "
        "float32."
    )


def _is_finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinity; this also waits for the device.

    A sum is one pass where looking at every value takes four, and is finite only if all are. It may
    overflow where none is, so then they are looked at.
    """
    total = values.sum(dtype=torch.float32)
    return math.isfinite(total.item()) or bool(values.isfinite().all())
