"""Notes how plain pictures of a model are drawn, for `pipeline.recorded`, which draws more of them.

A picture is drawn once more while the calls of compiled networks are listened to. What was noted is
kept only if it draws the very same picture.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.utils import _pytree as pytree

from twostep.engines.openvino import GraphCall, graph_calls, settings
from twostep.formats import resolve
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.recorded import draw_recorded, is_plain
from twostep.pipeline.recordings import (
    ENGINE,
    FileState,
    GraphUse,
    OpenRecording,
    Recording,
    Wish,
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
    if not is_plain(request) or bundle.runtime.engine != ENGINE or not _is_fit(bundle):
        return False
    wish = Wish(request.model, request.steps, request.width, request.height)
    recording = _noted(bundle, request, result)
    if recording is None or not write_recording(wish, recording):
        return False
    again = draw_recorded(OpenRecording(recording), request)
    is_same = (
        again is not None
        and again.images[0].tobytes() == result.images[0].tobytes()
        and again.warnings == result.warnings
        and again.request == result.request
        and again.traits == result.traits
    )
    if not is_same:
        with suppress(OSError):
            recording_path(wish).unlink()
    return is_same


def _is_fit(bundle: Bundle) -> bool:
    """Tell whether nothing but graphs, tokenizers and sums make the pictures of a model."""
    text = bundle.text
    return (
        bundle.contract.role == "student"
        and bundle.runtime.run is not None
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
    with graph_calls() as calls:
        generate(fresh, request)
    if len(calls) != 4:
        return None
    first, second, run, decoder = calls
    mean, scale = codec._scaling(run.tensors[0])
    if not isinstance(mean, float) or not isinstance(scale, float):
        return None
    files = _files(request)
    if files is None:
        return None
    texts = [_taken(call, lambda answer: [answer.hidden_states[-2]]) for call in (first, second)]
    pooled = _taken(second, lambda answer: [answer[0]])
    return Recording(
        versions=versions(),
        files=files,
        settings=settings("f32"),
        tokenizers=(str(text.tokenizers[0].folder), str(text.tokenizers[1].folder)),
        texts=(
            GraphUse(first.graph.name, texts[0]),
            GraphUse(second.graph.name, (*texts[1], *pooled)),
        ),
        run=GraphUse(run.graph.name, _taken(run, lambda answer: [answer["latents"]])),
        decoder=GraphUse(decoder.graph.name, (0,)),
        sizes=tuple(run.tensors[3][0].tolist()),
        latent_shape=tuple(run.tensors[0].shape[1:]),
        latent_mean=mean,
        latent_scale=scale,
        contract=bundle.contract.to_json(),
        settled={name: getattr(result.request, name) for name in _SETTLED},
        origin=result.origin,
        zeros_for_empty=result.traits.zeros_for_empty,
    )


def _taken(call: GraphCall, pick: Callable[[Any], list[Any]]) -> tuple[int, ...]:
    """Return the places among the tensors of an answer of what is picked of it."""
    spec = call.graph.answer_spec
    places = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    return tuple(pick(places))


def _files(request: Request) -> tuple[FileState, ...] | None:
    """Return the files of a model folder; None of a model that is none, or of very many."""
    checkpoint = resolve(request.model)
    if not checkpoint.is_folder:
        return None  # what lies beside a single file may be of other models
    paths = [path for path in sorted(checkpoint.path.rglob("*")) if path.is_file()]
    if len(paths) > _MOST_FILES:
        return None
    return tuple(map(FileState.of, paths))
