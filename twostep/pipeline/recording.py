"""Notes how plain pictures of a model are drawn, for `pipeline.recorded`, which draws more of them.

A picture is drawn once more while the calls of compiled networks are listened to. What was noted is
kept only if it draws the very same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from twostep.diffusion.grid import time_table, time_tensor
from twostep.engines.fixed_run import FixedRuns
from twostep.engines.graphs import is_large
from twostep.engines.openvino import GraphCall, graph_calls
from twostep.formats import resolve
from twostep.media.codec import FULL
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.prepare import Prepared, prepare
from twostep.pipeline.recorded import MEANINGS, NEXT, NEXT_INPUTS, draw_recorded, is_plain, key_of
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
    # What is remembered of the prompt is not encoded again.
    fresh = replace(bundle, text=replace(text, memory=None))
    with graph_calls() as calls, torch.inference_mode():
        prepared = prepare(fresh, request)
        num_texts = len(calls)
        generate(fresh, request)
    drawing = calls[num_texts:]
    if num_texts != 2 or len(drawing) < 3:
        return None  # PyTorch runs what the engine could not make a graph of
    first, second, *networks = drawing
    with torch.inference_mode():
        is_one = len(networks) == 1
        uses = _piece_uses(bundle, prepared) if is_one else _step_uses(bundle, prepared, networks)
    files = _files(request)
    if uses is None or files is None:
        return None
    texts = [_used(call, lambda answer: [answer.hidden_states[-2]]) for call in (first, second)]
    pooled = _used(second, lambda answer: [answer[0]])
    return Recording(
        versions=versions(),
        files=files,
        tokenizers=(str(text.tokenizers[0].folder), str(text.tokenizers[1].folder)),
        texts=(texts[0], replace(texts[1], outputs=(*texts[1].outputs, *pooled.outputs))),
        sizes=tuple(prepared.guided.positive.sizes[0].tolist()),
        latent_shape=tuple(prepared.x0.shape[1:]),
        contract=bundle.contract.to_json(),
        settled={name: getattr(result.request, name) for name in _SETTLED},
        origin=result.origin,
        zeros_for_empty=result.traits.zeros_for_empty,
        is_large=is_large(bundle.denoiser.network),
        **vars(uses),
    )


@dataclass(frozen=True)
class _Uses:
    """How the networks behind the text encoders are used; fields as in `Recording`."""

    denoiser: GraphUse
    steps: Steps
    decoder: GraphUse
    latent_mean: float = 0.0
    latent_scale: float = 1.0
    tiny_factor: float = 1.0
    tiny_divisor: float = 1.0


def _piece_uses(bundle: Bundle, prepared: Prepared) -> _Uses | None:
    """Return the uses of small networks, of which one graph draws all.

    Opened are a graph of one step and one of the decoder, which takes less time. None where they do
    not compute the same numbers, to the last bit.
    """
    run = bundle.runtime.run
    if not isinstance(run, FixedRuns):
        return None
    noise = prepared.noise(prepared.request.seeds)
    positive = prepared.guided.positive
    whole = run(prepared.guided, noise, prepared.times, "euler")
    with graph_calls() as calls:
        pieces = run.in_pieces(positive, noise, prepared.times)
    if whole is None or whole.pictures is None or pieces is None:
        return None
    latents, pictures = pieces
    if not (torch.equal(latents, whole.latents) and torch.equal(pictures, whole.pictures)):
        return None
    *steps, decoder = calls
    return _Uses(
        denoiser=_used(steps[0], lambda answer: [answer["latents"]]),
        steps=_steps(bundle, prepared, NEXT_INPUTS, "float32", NEXT),
        decoder=_used(decoder, lambda answer: [answer]),
    )


def _step_uses(bundle: Bundle, prepared: Prepared, calls: Sequence[GraphCall]) -> _Uses | None:
    """Return the uses of large networks; None where it is not known how they are used."""
    *denoisers, decoder = calls
    denoiser = bundle.denoiser
    if denoiser.prediction_type not in MEANINGS or len(denoisers) != len(prepared.times) - 1:
        return None
    if len({call.graph.name for call in denoisers}) != 1:
        return None
    inputs = _inputs(bundle, prepared, denoisers[0])
    codec: Any = bundle.codec
    mean, scale = codec.mean_and_factor(prepared.x0)
    if inputs is None or not isinstance(mean, float) or not isinstance(scale, float):
        return None
    time_type = str(denoisers[0].tensors[inputs.index("time")].numpy().dtype)
    tiny = None if codec.decoder == FULL else codec.tiny
    return _Uses(
        denoiser=_used(denoisers[0], lambda answer: [answer[0]]),
        steps=_steps(bundle, prepared, inputs, time_type, denoiser.prediction_type),
        decoder=_used(decoder, lambda answer: [answer]),
        latent_mean=mean,
        latent_scale=scale,
        tiny_factor=1.0 if tiny is None else float(codec.vae.config.scaling_factor),
        tiny_divisor=1.0 if tiny is None else float(tiny.scaling_factor),
    )


def _steps(
    bundle: Bundle, prepared: Prepared, inputs: Sequence[str], time_type: str, prediction: str
) -> Steps:
    """Return how a network is called once for each step."""
    times, alphas, sigmas = time_table(prepared.times, bundle.denoiser.schedule).tolist()
    return Steps(
        inputs=tuple(inputs),
        network_times=tuple(times),
        time_type=time_type,
        alphas=tuple(alphas),
        sigmas=tuple(sigmas),
        prediction=prediction,
    )


def _inputs(bundle: Bundle, prepared: Prepared, call: GraphCall) -> list[str] | None:
    """Return the names of what a network is given, in order; None where that is not known."""
    positive = prepared.guided.positive
    given = {
        "x": prepared.noise(prepared.request.seeds),
        "time": bundle.denoiser.schedule.network_time(time_tensor(prepared.times)[:1]),
        "text": positive.text,
        "pooled": positive.pooled,
        "sizes": positive.sizes,
    }
    inputs = []
    for tensor in call.tensors:
        names = [name for name, value in given.items() if _is_same(value, tensor)]
        if len(names) != 1:
            return None
        inputs += names
    return inputs


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
