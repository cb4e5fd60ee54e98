"""From a request to pictures.

Text is encoded once, each image starts from its own noise, `sample` follows the flow along the trailing grid of the
contract, and the codec turns latents into pixels. A student is sampled by the same lines as its teacher, with fewer
times. This module keeps no state between two calls, and knows nothing of files, servers or progress bars.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from twostep.contract import Contract
from twostep.diffusion import Denoise, Prediction, initial_noise, sample
from twostep.errors import TwostepError
from twostep.models.bundle import Bundle
from twostep.models.codec import to_images
from twostep.pipeline.request import NUM_DISTINCT_SEEDS, Request, Result

MAX_BATCH = 16
"""Images that go through the network together; larger requests are drawn in several such batches."""


class GenerationError(TwostepError):
    """The model gave something that is not a picture."""


@dataclass(frozen=True, eq=False)
class Progress:
    """One step taken: `num_done` of `num_steps` of the whole request, for the images at these seeds.

    `prediction.x0` holds the latents [batch channels height width] of the pictures as they are foreseen now.
    """

    num_done: int
    num_steps: int
    seeds: list[int]
    prediction: Prediction


OnStep = Callable[[Progress], None]


@dataclass(frozen=True)
class _Plan:
    """What a request may leave to the contract, settled; guidance 1 is none."""

    steps: int
    guidance: float
    width: int
    height: int


def generate(bundle: Bundle, request: Request, *, on_step: OnStep | None = None) -> Result:
    """Draw the images of a request with a model.

    Image i depends on the model and on seed + i alone, not on how many others are drawn with it. What the contract
    cannot honour raises `ContractError`, what it ignores becomes a warning; NaN or infinity out of the network raises
    `GenerationError`. `on_step` is called after every step; what it raises ends the drawing.
    """
    warnings = bundle.contract.check(request.steps, request.guidance, request.width, request.height)
    plan = _plan(bundle.contract, request)
    request = replace(request, **asdict(plan))
    seconds = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
    images: list[Image.Image] = []
    with torch.inference_mode():
        with _timed(seconds, "text"):
            warnings += _prompt_warnings(bundle, request) + _seed_warnings(request)
            denoise_for = _conditioned(bundle, request, plan)
        for start in range(0, request.num_images, MAX_BATCH):
            seeds = request.seeds[start : start + MAX_BATCH]
            with _timed(seconds, "denoise"):
                report = _reporter(request.num_images, start, plan.steps, seeds, on_step)
                latents = _denoise(bundle, plan, denoise_for(len(seeds)), seeds, report)
            with _timed(seconds, "decode"):
                images += to_images(_finite(bundle.codec.decode(latents), "pixels", seeds))
    return Result(images, request.seeds, seconds, warnings, bundle.contract, request)


def _plan(contract: Contract, request: Request) -> _Plan:
    """Settle a request that the contract has checked; a student's guidance is distilled into it, so it gets none."""
    wish = contract.guidance if request.guidance is None else request.guidance
    width, height = next(
        size for size in contract.sizes if request.width in (None, size[0]) and request.height in (None, size[1])
    )
    return _Plan(
        steps=request.steps or contract.steps,
        guidance=1.0 if contract.role == "student" else max(1.0, wish),
        width=width,
        height=height,
    )


def _conditioned(bundle: Bundle, request: Request, plan: _Plan) -> Callable[[int], Denoise]:
    """Encode the text once; the answer makes a denoiser for any number of images of it."""
    prompts = [request.prompt] if plan.guidance == 1 else [request.prompt, request.negative_prompt]
    encoded = bundle.conditioning(prompts, plan.width, plan.height)

    def denoise_for(num_images: int) -> Denoise:
        prompt = encoded[:1].expand(num_images)
        if plan.guidance == 1:
            return bundle.denoiser.given(prompt)
        return bundle.denoiser.guided(prompt, encoded[1:].expand(num_images), plan.guidance)

    return denoise_for


def _denoise(
    bundle: Bundle, plan: _Plan, denoise: Denoise, seeds: list[int], report: Callable[[int, Prediction], None]
) -> Float[Tensor, "batch channels height width"]:
    """Follow the flow from the noise of these seeds to clean latents."""
    shape = bundle.latent_shape(plan.width, plan.height)
    noise = torch.stack([initial_noise(seed, shape) for seed in seeds]).to(bundle.denoiser.device)
    latents = sample(denoise, noise, plan.steps, bundle.denoiser.schedule, report)
    return _finite(latents, "latents", seeds)


def _reporter(
    num_images: int, start: int, num_steps: int, seeds: list[int], on_step: OnStep | None
) -> Callable[[int, Prediction], None]:
    """Count the steps of one batch on top of those of the batches before it."""
    total = -(-num_images // MAX_BATCH) * num_steps
    before = start // MAX_BATCH * num_steps

    def report(index: int, prediction: Prediction) -> None:
        if on_step is not None:
            on_step(Progress(before + index + 1, total, seeds, prediction))

    return report


def _finite(values: Float[Tensor, "batch ..."], what: str, seeds: list[int]) -> Float[Tensor, "batch ..."]:
    broken = [seed for seed, image in zip(seeds, values, strict=True) if not bool(image.isfinite().all())]
    if broken:
        raise GenerationError(
            f"the {what} of seed(s) {', '.join(map(str, broken))} hold NaN or infinity; expected finite numbers. "
            f"Either the weights are damaged or half precision overflowed: load the model again, in float32."
        )
    return values


def _prompt_warnings(bundle: Bundle, request: Request) -> list[str]:
    """Say what of the prompts will not have the effect one expects; the request's guidance is the settled one."""
    warnings = []
    if not request.prompt.strip():
        warnings.append("the prompt is empty: the model may draw anything it knows.")
    texts = [request.prompt, request.negative_prompt]
    if request.negative_prompt and request.guidance == 1:
        texts.pop()
        warnings.append("the negative prompt has no effect: it acts through guidance, and there is none here.")
    excess = bundle.text.num_excess_tokens(request.prompt)
    if excess:
        warnings.append(f"the prompt is too long: its last {excess} token(s) are cut off. Say it in fewer words.")
    unknown = [word for text in texts for word in bundle.text.unknown_words(text)]
    if unknown:
        warnings.append(
            f"not in the vocabulary of {bundle.contract.name}: {', '.join(dict.fromkeys(unknown))}. "
            f"It has never seen these words, so expect nothing of them."
        )
    return warnings


def _seed_warnings(request: Request) -> list[str]:
    last = request.seeds[-1]
    if last < NUM_DISTINCT_SEEDS:
        return []
    return [
        f"seed {last} draws the same noise as seed {last % NUM_DISTINCT_SEEDS}: "
        f"torch's generator tells only 2**32 seeds apart."
    ]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time of the block to its stage; the checks for NaN wait for the device, so nothing is left running."""
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start
