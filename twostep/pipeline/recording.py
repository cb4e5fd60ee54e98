"""Notes how plain pictures of a model are drawn, for `pipeline.recorded`, which draws more of them.

A picture is drawn once more while the calls of compiled networks are listened to. What was noted is
kept only if it draws the very same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from twostep.diffusion.grid import time_tensor
from twostep.engines.openvino import GraphCall, graph_calls
from twostep.formats import resolve
from twostep.media.codec import FULL
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.prepare import Prepared, prepare
from twostep.pipeline.recorded import MEANINGS, draw_recorded, is_plain, key_of
from twostep.pipeline.recordings import (
    FileState,
    GraphUse,
    OpenRecording,
    Recording,
    Steps,
    recording_path,
    versions,
    write_recording,
)
from twostep.pipeline.request import Request, Result
from twostep.text.clip import TextEncoders
from twostep.text.words import ClipWords

_SETTLED = (
    "model",
    "steps",
    "guidance",
    "width",
    "height",
    "strength",
    "sampler",
    "engine",
    "decoder",
    "frames",
)
"""Fields of a request that are filled in when it is made ready for a model."""
_MOST_FILES = 1000
"""In the folder of a model; where there are more, what is in it is not looked at every time."""


def record(bundle: Bundle, request: Request, result: Result) -> bool:
    """Note how a plain picture was drawn, if it is of the kind that can be drawn without PyTorch.

    Args:
        bundle: What drew it, prepared by an engine.
        request: As it was asked for.
        result: What came of it.

    Returns:
        Whether pictures like it are drawn without PyTorch from now on.
    """
    if not is_plain(request) or bundle.runtime.engine != request.engine or not _is_fit(bundle):
        return False
    recording = _noted(bundle, request, result)
    if recording is None:
        return False
    again = draw_recorded(OpenRecording(recording), request)
    is_same = (
        again is not None
        and again.images[0].tobytes() == result.images[0].tobytes()
        and again.warnings == result.warnings
        and again.request == result.request
        and again.traits == result.traits
    )
    key = key_of(request)
    if is_same:
        return write_recording(key, recording)
    with suppress(OSError):
        recording_path(key).unlink()
    return False


def _is_fit(bundle: Bundle) -> bool:
    """Tell whether nothing but networks, tokenizers and sums make the pictures of a model."""
    text = bundle.text
    return (
        bundle.contract.role == "student"
        and bundle.contract.sampler == "euler"
        and not bundle.is_inpainting
        and isinstance(bundle.codec, ImageCodec)
        and isinstance(text, TextEncoders)
        and not text.embeddings
        and all(isinstance(words, ClipWords) and words.folder for words in text.tokenizers)
    )


def _noted(bundle: Bundle, request: Request, result: Result) -> Recording | None:
    """Draw once more and note what was called; None where that is not what can be noted."""
    text: Any = bundle.text
    codec: Any = bundle.codec
    # What is remembered of the prompt is not encoded again.
    fresh = replace(bundle, text=replace(text, memory=None))
    with graph_calls() as calls, torch.inference_mode():
        prepared = prepare(fresh, request)
        num_texts = len(calls)
        generate(fresh, request)
    drawing = calls[num_texts:]
    if num_texts != 2 or len(drawing) < 4:
        return None  # PyTorch runs what the engine could not make a graph of
    first, second, *denoisers, decoder = drawing
    is_together = bundle.runtime.run is not None and len(denoisers) == 1
    steps = None if is_together else _steps(bundle, prepared, denoisers)
    mean, scale = codec._scaling(decoder.tensors[0])
    tiny = None if codec.decoder == FULL else codec.tiny
    files = _files(request)
    has_scale = isinstance(mean, float) and isinstance(scale, float)
    if not has_scale or files is None or not (is_together or steps):
        return None
    texts = [_used(call, lambda answer: [answer.hidden_states[-2]]) for call in (first, second)]
    pooled = _used(second, lambda answer: [answer[0]])
    taken = _used(denoisers[0], lambda answer: [answer["latents"] if is_together else answer[0]])
    return Recording(
        versions=versions(),
        files=files,
        tokenizers=(str(text.tokenizers[0].folder), str(text.tokenizers[1].folder)),
        texts=(texts[0], replace(texts[1], outputs=(*texts[1].outputs, *pooled.outputs))),
        denoiser=taken,
        steps=steps,
        decoder=_used(decoder, lambda answer: [answer]),
        sizes=tuple(prepared.guided.positive.sizes[0].tolist()),
        latent_shape=tuple(prepared.x0.shape[1:]),
        latent_mean=mean,
        latent_scale=scale,
        tiny_factor=1.0 if tiny is None else float(codec.vae.config.scaling_factor),
        tiny_divisor=1.0 if tiny is None else float(tiny.scaling_factor),
        contract=bundle.contract.to_json(),
        settled={name: getattr(result.request, name) for name in _SETTLED},
        origin=result.origin,
        zeros_for_empty=result.traits.zeros_for_empty,
    )


def _steps(bundle: Bundle, prepared: Prepared, calls: Sequence[GraphCall]) -> Steps | None:
    """Return how a network that is called once a step is used; None where that is not known."""
    denoiser = bundle.denoiser
    if denoiser.prediction_type not in MEANINGS or len(calls) != len(prepared.times) - 1:
        return None
    if len({call.graph.name for call in calls}) != 1:
        return None
    times = time_tensor(prepared.times)
    network_times = denoiser.schedule.network_time(times[:-1])
    alphas, sigmas = denoiser.schedule.coefficients(times, times.float())
    positive = prepared.guided.positive
    given = {
        "x": prepared.noise(prepared.request.seeds),
        "time": network_times[:1],
        "text": positive.text,
        "pooled": positive.pooled,
        "sizes": positive.sizes,
    }
    inputs = []
    for tensor in calls[0].tensors:
        names = [name for name, value in given.items() if _is_same(value, tensor)]
        if len(names) != 1:
            return None
        inputs += names
    return Steps(
        inputs=tuple(inputs),
        network_times=tuple(network_times.tolist()),
        time_type=str(calls[0].tensors[inputs.index("time")].numpy().dtype),
        alphas=tuple(alphas.flatten().tolist()),
        sigmas=tuple(sigmas.flatten().tolist()),
        prediction=denoiser.prediction_type,
    )


def _is_same(given: Tensor, tensor: Tensor) -> bool:
    """Tell whether a network was given a tensor, which it may read in another precision."""
    return given.shape == tensor.shape and torch.equal(given.to(tensor.dtype), tensor)


def _used(call: GraphCall, pick: Callable[[Any], list[Any]]) -> GraphUse:
    """Return a compiled network and the places in its answer of what is picked of it."""
    spec = call.graph.answer_spec
    places = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return GraphUse(call.graph.name, call.graph.compiled_as, tuple(pick(places)))


def _files(request: Request) -> tuple[FileState, ...] | None:
    """Return the files of a model folder; None of a model that is none, or of very many."""
    checkpoint = resolve(request.model)
    if not checkpoint.is_folder:
        return None  # what lies beside a single file may be of other models
    paths = [path for path in sorted(checkpoint.path.rglob("*")) if path.is_file()]
    if len(paths) > _MOST_FILES:
        return None
    return tuple(map(FileState.of, paths))
