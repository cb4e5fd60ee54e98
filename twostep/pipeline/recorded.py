"""Drawings without PyTorch, from recordings.

A process that draws one plain picture with the engine `openvino` needs neither PyTorch, which takes
seconds to load, nor the model's weights, if such a picture was drawn before: `pipeline.recording`
then noted which compiled networks were called. They are called again here, with the same numbers,
so the pixels are the same; that was compared when the recording was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twostep.contract import Contract
from twostep.formats import few_step
from twostep.media.codec import FULL, TINY
from twostep.media.eight_bits import eight_bits, images
from twostep.models.runtime import take_notes
from twostep.pipeline.noise import torch_noise
from twostep.pipeline.recordings import (
    ENGINES,
    OpenGraph,
    OpenRecording,
    Recording,
    RecordingKey,
    Steps,
)
from twostep.pipeline.request import NUM_DISTINCT_SEEDS, ModelTraits, Request, Result
from twostep.pipeline.timing import timed
from twostep.text.prompt_weights import has_weights, is_composable, without_weights
from twostep.text.words import ClipWords, unknown_words_warning, words_in_pieces

NEXT_INPUTS = ("x", "text", "pooled", "sizes", "table")
"""What a network is given, in order, that has the sums of a step within it."""

MEANINGS = ("eps", "x0", "v")
"""What the output of a network may mean that is called once a step."""

NEXT = "next"
"""What it means where the sums of a step are within the network: the latents at the next time."""

Array = NDArray[Any]


def draw_recorded(opened: OpenRecording, request: Request) -> Result | None:
    """Draw a request from the recording that was opened for it.

    None where that cannot be, and PyTorch has to draw it: a request that is not plain, a prompt
    that is too long, networks that have gone, or numbers that are none. Of the seconds in the
    result, "load" are those in which this waited for the networks.
    """
    if not is_plain(request):
        return None
    recording = opened.recording
    words = _words(recording)
    if words is None or _is_long(request.prompt, words[0]):
        return None  # long prompts are put together of chunks
    seconds: dict[str, float] = {}
    image = _drawn(opened, request, words, seconds)
    if image is None:
        return None
    contract = Contract.from_json(recording.contract)
    return Result(
        images=[image],
        seeds=request.seeds,
        seconds=seconds,
        warnings=[*_warnings(contract, request, words[0]), *take_notes()],
        contract=contract,
        request=replace(request, **recording.settled),
        origin=recording.origin,
        traits=ModelTraits(zeros_for_empty=recording.zeros_for_empty),
    )


def is_plain(request: Request) -> bool:
    """Tell whether a request is of the kind that recordings are made of.

    That is one picture from a prompt alone, of words that count alike, with the model's own
    settings.
    """
    prompt = request.prompt
    left_open = (
        request.image,
        request.guidance,
        request.sampler,
        request.treated_as,
        request.frames,
    )
    return (
        request.engine in ENGINES
        and request.num_images == 1
        and request.seed < NUM_DISTINCT_SEEDS
        and request.decoder in (FULL, TINY)
        and request.init_noise == "comfyui"
        and not request.negative_prompt
        and not (request.loras or request.embeddings or request.controls)
        and all(value is None for value in left_open)
        and bool(prompt.strip())
        and "embedding:" not in prompt
        and not has_weights(prompt)
        and without_weights(prompt) == prompt
        and not is_composable(prompt)
    )


def key_of(request: Request) -> RecordingKey:
    """Return by what the recording for a request is found."""
    return RecordingKey(
        engine=request.engine,
        decoder=request.decoder,
        model=request.model,
        steps=request.steps,
        width=request.width,
        height=request.height,
    )


def _drawn(
    opened: OpenRecording,
    request: Request,
    words: Sequence[ClipWords],
    seconds: dict[str, float],
) -> Image.Image | None:
    """Return the picture, and add up the seconds of its stages.

    None where a network is not there any more, or gives what is no number.
    """
    recording = opened.recording
    given = _encoded(opened, request, words, seconds)
    if given is None:
        return None
    shape = recording.latent_shape
    noise = torch_noise(request.seed, int(np.prod(shape))).reshape(1, *shape)
    latents = _denoised(opened, {**given, "x": noise}, seconds)
    pictures = None if latents is None else _decoded(opened, latents, seconds)
    if latents is None or pictures is None:
        return None
    if not (np.isfinite(latents).all() and np.isfinite(pictures).all()):
        return None  # PyTorch says what is wrong
    with timed(seconds, "decode"):
        (image,) = images(eight_bits(pictures))
        return image


def _decoded(opened: OpenRecording, latents: Array, seconds: dict[str, float]) -> Array | None:
    """Return the pictures of latents; None where the decoder is not there any more."""
    recording = opened.recording
    with timed(seconds, "load"):
        decoder = opened.decoder()
    if decoder is None:
        return None
    with timed(seconds, "decode"):
        z = latents / np.float32(recording.latent_scale) + np.float32(recording.latent_mean)
        factor, divisor = np.float32(recording.tiny_factor), np.float32(recording.tiny_divisor)
        (pictures,) = decoder(z * factor / divisor)
    return pictures


def _encoded(
    opened: OpenRecording,
    request: Request,
    words: Sequence[ClipWords],
    seconds: dict[str, float],
) -> dict[str, Array] | None:
    """Return what a denoiser is given of a prompt and a size, by the names in `Steps`."""
    texts = []
    for place, each in enumerate(words):
        with timed(seconds, "load"):
            encoder = opened.text(place)
        if encoder is None:
            return None
        with timed(seconds, "text"):
            tokens = each([request.prompt], padding="max_length", truncation=True).input_ids
            texts.append(encoder(np.array(tokens, np.int64)))
    (first,), (second, pooled) = texts
    return {
        "text": np.concatenate([first, second], axis=-1),
        "pooled": pooled,
        "sizes": np.array([opened.recording.sizes], np.float32),
    }


def _denoised(
    opened: OpenRecording, given: dict[str, Array], seconds: dict[str, float]
) -> Array | None:
    """Return the latents at the end of all steps."""
    with timed(seconds, "load"):
        denoiser = opened.denoiser()
    if denoiser is None:
        return None
    with timed(seconds, "denoise"):
        return _stepped(denoiser, opened.recording.steps, given)


def _stepped(denoiser: OpenGraph, steps: Steps, given: dict[str, Array]) -> Array:
    """Return the latents after all steps (eq 5 of arXiv 2402.13929), summed up as PyTorch does."""
    x = given["x"]
    times = np.array(steps.network_times, steps.time_type)
    alphas = np.array(steps.alphas, np.float32)
    sigmas = np.array(steps.sigmas, np.float32)
    for i in range(len(alphas) - 1):
        values = {**given, "x": x, "time": times[i : i + 1]}
        if steps.prediction == NEXT:
            values["table"] = np.stack([each[i : i + 2] for each in (times, alphas, sigmas)])
        (output,) = denoiser(*(values[name] for name in steps.inputs))
        if steps.prediction == NEXT:
            x = output
            continue
        x0, eps = _prediction(steps.prediction, output, x, alphas[i], sigmas[i])
        x = alphas[i + 1] * x0 + sigmas[i + 1] * eps
    return x


def _prediction(
    meaning: str, output: Array, x: Array, alpha: np.float32, sigma: np.float32
) -> tuple[Array, Array]:
    """Return x0 and eps, as `diffusion.prediction_from_output` does with tensors."""
    if meaning == "eps":
        return (x - sigma * output) / alpha, output
    if meaning == "x0":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, sigma * x + alpha * output


def _warnings(contract: Contract, request: Request, words: ClipWords) -> list[str]:
    """Say what `pipeline.prepare` says of plain requests, in the same order."""
    warnings = contract.check(request.steps, None, request.width, request.height)
    unknown = words_in_pieces(request.prompt, words.tokenize)
    if unknown:
        warnings.append(unknown_words_warning(contract.name, unknown))
    few_steps = few_step.note(contract)
    if few_steps is not None:
        warnings.append(few_steps)
    return warnings


def _words(recording: Recording) -> list[ClipWords] | None:
    """Read the tokenizers of a model; None where one is not what it was."""
    words = [ClipWords.read(Path(folder)) for folder in recording.tokenizers]
    known = [each for each in words if each is not None]
    return known if len(known) == len(words) else None


def _is_long(prompt: str, words: ClipWords) -> bool:
    """Tell whether a prompt is longer than the tokenizer's limit."""
    return len(words(prompt).input_ids) > words.model_max_length
