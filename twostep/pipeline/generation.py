"""From a request to pictures.

Text is encoded once, each image starts from its own noise, the flow is followed along the trailing
grid of the contract, and the codec turns latents into pixels. A student is sampled by the same
lines as its teacher, with fewer times. This module keeps no state between two calls, and knows
nothing of files, servers or progress bars.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twostep.contract import TOP_TIME, Contract
from twostep.data.sources import nearest_size
from twostep.diffusion import Prediction, falling_times, trailing_times
from twostep.errors import TwostepError
from twostep.media.image import ImageCodec, to_images
from twostep.models.bundle import Bundle
from twostep.pipeline.prepare import Inputs
from twostep.pipeline.request import MAX_BATCH, NUM_DISTINCT_SEEDS, Request, Result

DEFAULT_STRENGTH = 0.75
"""How much of an image is changed where a request does not say it and has no mask."""


class GenerationError(TwostepError):
    """The model gave something that is not a picture."""


@dataclass(frozen=True, eq=False)
class Progress:
    """One step taken: `num_done` of `num_steps` of the whole request, for the images at these
    seeds.

    `prediction.x0` holds the latents [batch channels height width] of the pictures as they are
    foreseen now.
    """

    num_done: int
    num_steps: int
    seeds: list[int]
    prediction: Prediction
    codec: ImageCodec

    def previews(self) -> list[Image.Image]:
        """Return the pictures as they are foreseen now, small, a pixel for each latent."""
        return to_images(self.codec.preview(self.prediction.x0))


OnStep = Callable[[Progress], None]


def generate(bundle: Bundle, request: Request, *, on_step: OnStep | None = None) -> Result:
    """Draw the images of a request with a model.

    Image i depends on the model and on seed + i alone, not on how many others are drawn with it.
    What the contract cannot honour raises `ContractError`, what it ignores becomes a warning; NaN
    or infinity out of the network raises `GenerationError`. `on_step` is called after every step;
    what it raises ends the drawing. Several threads may draw with one bundle at once.
    """
    contract, wish = bundle.contract, request.strength
    warnings = contract.check(request.steps, request.guidance, request.width, request.height)
    request, times = _settled(contract, request)
    seconds = dict.fromkeys(("text", "encode", "denoise", "decode"), 0.0)
    images: list[Image.Image] = []
    num_steps, done = -(-request.num_images // MAX_BATCH) * (len(times) - 1), count(1)

    def report(_: int, prediction: Prediction) -> None:
        if on_step is not None:
            on_step(Progress(next(done), num_steps, seeds, prediction, bundle.codec))

    with torch.inference_mode():
        with _timed(seconds, "text"):
            warnings += _warnings(bundle, request, times, wish)
            prompts = (
                [request.prompt]
                if request.guidance == 1
                else [request.prompt, request.negative_prompt]
            )
            told = bundle.conditioning(prompts, request.width or 0, request.height or 0, whole=True)
        with _timed(seconds, "encode"):
            inputs = Inputs.of(bundle, request, times)
        for start in range(0, request.num_images, MAX_BATCH):
            seeds = request.seeds[start : start + MAX_BATCH]
            with _timed(seconds, "denoise"):
                latents = _finite(
                    inputs.draw(bundle.denoiser, told, seeds, report), "latents", seeds
                )
            with _timed(seconds, "decode"):
                pictures = _finite(bundle.codec.decode(latents), "pixels", seeds)
                images += to_images(inputs.finished(pictures))
    return Result(images, request.seeds, seconds, warnings, contract, request, bundle.origin)


def _settled(contract: Contract, request: Request) -> tuple[Request, tuple[int | float, ...]]:
    """Return a checked request with nothing left open, and the times that it walks, the landing 0
    included.

    A student's guidance is distilled into it, so it gets none, which is 1. Sizes left open are
    those that fit the pictures best. An image is begun at that trained time, or of a teacher's
    grid, which is nearest to the strength.
    """
    wish = contract.guidance if request.guidance is None else request.guidance
    steps, start, strength = request.steps or contract.steps, TOP_TIME, None
    if request.image is not None:
        wished = TOP_TIME * (request.strength or (DEFAULT_STRENGTH if request.mask is None else 1))
        start = min(
            contract.trained_times or trailing_times(steps), key=lambda t: (abs(t - wished), -t)
        )
        strength = start / TOP_TIME
    fitting = [
        (w, h)
        for w, h in contract.sizes
        if request.width in (None, w) and request.height in (None, h)
    ]
    # between those sizes, as the contract allows
    fitting = fitting or [(request.width or 0, request.height or 0)]
    picture = request.image or next((control.picture for control in request.controls), None)
    width, height = fitting[0] if picture is None else nearest_size(picture.image, fitting)
    guidance = 1.0 if contract.role == "student" else max(1.0, wish)
    request = replace(
        request, steps=steps, guidance=guidance, width=width, height=height, strength=strength
    )
    return request, falling_times(start, steps)


def _finite(
    values: Float[Tensor, "batch ..."], what: str, seeds: list[int]
) -> Float[Tensor, "batch ..."]:
    broken = [
        seed for seed, image in zip(seeds, values, strict=True) if not bool(image.isfinite().all())
    ]
    if broken:
        where = f"the {what} of seed(s) {', '.join(map(str, broken))}"
        advice = "Either the weights are damaged or half precision overflowed: load the model again, in float32"
        raise GenerationError(f"{where} hold NaN or infinity; expected finite numbers. {advice}.")
    return values


def _warnings(
    bundle: Bundle, request: Request, times: tuple[int | float, ...], wish: float | None
) -> list[str]:
    """Say what of a settled request will not have the effect one expects; `wish` is the strength it
    asked for.
    """
    warnings, name, taken = [], bundle.contract.name, times[0] / TOP_TIME
    if not request.prompt.strip():
        warnings.append("the prompt is empty: the model may draw anything it knows.")
    texts = [request.prompt, request.negative_prompt]
    if request.negative_prompt and request.guidance == 1:
        texts.pop()
        warnings.append(
            "the negative prompt has no effect: it acts through guidance, and there is none here."
        )
    if unknown := dict.fromkeys(word for text in texts for word in bundle.text.unknown_words(text)):
        advice = "It has never seen these words, so expect nothing of them."
        warnings.append(f"not in the vocabulary of {name}: {', '.join(unknown)}. {advice}")
    if (last := request.seeds[-1]) >= NUM_DISTINCT_SEEDS:
        same = f"draws the same noise as seed {last % NUM_DISTINCT_SEEDS}"
        warnings.append(f"seed {last} {same}: torch's generator tells only 2**32 seeds apart.")
    if wish not in (None, taken) and bundle.contract.role == "student":
        stops = ", ".join(f"{t / TOP_TIME:g}" for t in sorted(bundle.contract.trained_times))
        why = f"which takes {len(times) - 1} step(s): {name} was trained to begin at {stops}, and nowhere between."
        warnings.append(f"strength {wish:g} became {taken:g}, {why}")
    return warnings


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to its stage; the checks for NaN wait for the device, so nothing is
    left running.
    """
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start
