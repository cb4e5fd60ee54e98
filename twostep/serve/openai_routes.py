"""The OpenAI images API: /v1/images/generations, /v1/images/edits and /v1/models.

Clients name models that are not served, and steps, qualities and sizes of other models. What comes
nearest is drawn, and the header X-Twostep-Changes says what was changed. Beyond the API's own
fields, `steps` (or `num_inference_steps`), `seed`, `negative_prompt`, `guidance_scale`, `strength`,
`loras`, `controls` and `frames` are read, which its SDK sends as `extra_body`. Clips are sent as
animated WebPs; of sounds see `openai_sound_routes`.
"""

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twostep.contract import ContractError
from twostep.pipeline.request import Picture, RequestError, Result
from twostep.serve.catalogue import Fitted, Wish
from twostep.serve.document import DRAWING, form_body, json_body, refusals
from twostep.serve.engine import Event, Job
from twostep.serve.following import (
    EventQueue,
    PictureFormat,
    drawing_of,
    ended,
    follow,
    in_base64,
    in_header,
    preview_in_base64,
    server_sent,
)
from twostep.serve.items import encode
from twostep.serve.openai_bodies import OpenAiBody
from twostep.serve.refusals import code_of
from twostep.serve.serving import (
    Serving,
    client_of,
    controls_of,
    json_of,
    picture_of,
    validated,
)
from twostep.serve.shapes import MAX_CONTROLS, MAX_FRAMES, ControlBody

MAX_IMAGES = 10
"""The most pictures of one request, as the API has it."""

QUALITY_STEPS = {"low": 1, "medium": 4, "standard": 4, "high": 8, "hd": 8, "xhigh": 8, "max": 8}
"""How many steps a quality asks for, where a request says no number; "auto" is not among them."""

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_IMAGE_FIELD = re.compile(r"images?(\[\d*\])?")

_Kind = Literal["image_generation", "image_edit"]


class ImagesBody(OpenAiBody):
    """What is read of a request; other fields are let through unread."""

    prompt: str
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    quality: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: PictureFormat | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: Literal["auto", "opaque", "transparent"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    strength: float | None = None
    frames: int | None = Field(default=None, ge=1, le=MAX_FRAMES)
    loras: tuple[str, ...] = ()
    controls: tuple[ControlBody, ...] = Field(default=(), max_length=MAX_CONTROLS)

    def notes(self) -> list[str]:
        """Return sentences about what this server does otherwise than the request has it."""
        notes = []
        if self.response_format == "url":
            notes.append("response_format url: pictures are sent as b64_json")
        if self.background == "transparent":
            notes.append("background transparent: pictures are opaque")
        return notes

    def wish(self, image: Picture | None = None, mask: Picture | None = None) -> Wish:
        """Return what is to be drawn; a seed that is left out is picked."""
        width, height = _size_of(self.size)
        steps = self.steps
        if steps is None and self.quality is not None:
            steps = QUALITY_STEPS.get(self.quality)
        return replace(
            self.plain_wish(self.prompt),
            num_images=1 if self.n is None else self.n,
            steps=steps,
            width=width,
            height=height,
            image=image,
            strength=self.strength,
            mask=mask,
            controls=controls_of(self.controls),
            loras=self.loras,
            frames=self.frames,
        )

    def format_for(self, media: str) -> PictureFormat:
        """Return the format in which pictures or clips are sent; clips are animated WebPs."""
        return "webp" if media == "video" else self.output_format or "png"

    def format_notes(self, media: str) -> list[str]:
        """Return a sentence if another format was asked for than can be sent."""
        taken = self.format_for(media)
        if self.output_format in (None, taken):
            return []
        return [f"output_format {self.output_format}: clips are sent as {taken}"]


class DrawnImage(BaseModel):
    """A picture of an answer: the file in base64, and the seed that draws it again."""

    b64_json: str
    seed: int


class TokenKinds(BaseModel):
    """What came in: words and pictures."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Words and pictures in, steps of the network out."""

    input_tokens: int
    input_tokens_details: TokenKinds
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    """What is answered where nothing is streamed. `created` is in seconds since 1970.

    `twostep` says what really was drawn, and what was changed.
    """

    created: int
    data: list[DrawnImage]
    background: str
    output_format: PictureFormat
    quality: str
    size: str
    usage: Usage
    twostep: dict[str, Any]


_FILES = {
    "image": {"type": "string", "format": "binary"},
    "image[]": {"type": "array", "items": {"type": "string", "format": "binary"}},
    "mask": {"type": "string", "format": "binary"},
}
"""The files of an edit. Either of the first two will do."""


def openai_routes(serving: Serving) -> APIRouter:
    """Return the addresses of the API, below /v1."""
    router = APIRouter(prefix="/v1", tags=["OpenAI images"], responses=refusals())
    drawn: dict[str, Any] = {
        "response_model": None,
        "responses": {
            200: {
                "model": ImagesAnswer,
                "description": "The pictures; events where `stream` is set.",
                "content": {"text/event-stream": {}},
            },
            **refusals(*DRAWING),
        },
    }

    @router.get("/models")
    def list_models() -> dict[str, Any]:
        """List the names that `model` may have."""
        return {"object": "list", "data": [_model(name) for name in _names(serving)]}

    @router.get("/models/{name:path}")
    def describe_model(name: str) -> dict[str, Any]:
        """Describe one model."""
        return _model(serving.catalogue.find(name).name)

    @router.post("/images/generations", openapi_extra=json_body(ImagesBody), **drawn)
    async def generations(http: HttpRequest) -> Response:
        """Draw pictures of a prompt."""
        body = validated(ImagesBody, await json_of(http))
        return await _answer(serving, http, "image_generation", body, body.wish, body.notes())

    @router.post("/images/edits", openapi_extra=form_body(ImagesBody, _FILES), **drawn)
    async def edits(http: HttpRequest) -> Response:
        """Change a picture, all of it or where the mask is transparent."""
        async with http.form(max_files=32, max_fields=200) as form:
            body = validated(ImagesBody, _fields_of(form))
            images = await _files_of(form, _IMAGE_FIELD)
            masks = await _files_of(form, re.compile("mask"))
        if not images:
            raise RequestError("there is no image; send the part image or image[].")
        notes = body.notes()
        if len(images) > 1:
            notes.append(f"{len(images)} images: the first alone was taken")

        def make() -> Wish:
            mask = picture_of(masks[0]) if masks else None
            return body.wish(picture_of(images[0]), None if mask is None else _editable(mask))

        return await _answer(serving, http, "image_edit", body, make, notes)

    return router


async def _answer(
    serving: Serving,
    http: HttpRequest,
    kind: _Kind,
    body: ImagesBody,
    make: Callable[[], Wish],
    notes: list[str],
) -> Response:
    """Draw, and send pictures at the end or events on the way."""
    fitted = await serving.fit(http, make, media=("image", "video"))
    notes = [*notes, *body.format_notes(fitted.served.media)]
    if serving.strict and notes:
        raise ContractError(f"{notes[0]}. This server is strict.")
    num_partials = (body.partial_images or 0) if body.stream else 0
    # Made before the job, which may be drawn before the first line of the answer is sent.
    queue = EventQueue() if body.stream else None
    job = serving.submit(
        fitted,
        client=client_of(http),
        wants_previews=num_partials > 0,
        listener=None if queue is None else queue.listen,
    )
    changes = [*notes, *fitted.changes]
    headers = {"X-Twostep-Job": job.id}
    if changes:
        headers["X-Twostep-Changes"] = in_header(changes)
    if queue is not None:
        events = _stream(serving, http, kind, body, job, queue, fitted, changes)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    if not await ended(serving.engine, job, http):
        return Response(status_code=499)  # nobody reads it
    result = job.wait(0.0)
    data = await run_in_threadpool(_data, result, body)
    answer = {
        "created": int(time.time()),
        "data": data,
        **_described(result, body),
        "usage": _usage(result),
        "twostep": drawing_of(result, fitted, changes),
    }
    return JSONResponse(answer, headers=headers)


async def _stream(
    serving: Serving,
    http: HttpRequest,
    kind: _Kind,
    body: ImagesBody,
    job: Job,
    queue: EventQueue,
    fitted: Fitted,
    changes: list[str],
) -> AsyncIterator[str]:
    """Yield a partial image for each picture at chosen steps, then each picture, as events."""
    index = 0
    events = follow(serving.engine, job, http, is_owner=True, queue=queue)
    async with contextlib.aclosing(events):
        async for event in events:
            if event.kind == "step" and _is_partial(event, body.partial_images or 0):
                for preview in event.previews:
                    values = {
                        "type": f"{kind}.partial_image",
                        "b64_json": await run_in_threadpool(preview_in_base64, preview),
                        "partial_image_index": index,
                        "created_at": int(time.time()),
                        "size": f"{preview.width}x{preview.height}",
                        "quality": body.quality or "auto",
                        "background": "opaque",
                        "output_format": "png",
                    }
                    yield server_sent(f"{kind}.partial_image", values)
                index += 1
            if not event.is_end:
                continue
            if job.result is None:
                error = {"message": str(job.error), "type": "server_error", "param": None}
                yield server_sent(
                    "error", {"error": error | {"code": code_of(job.error) or event.kind}}
                )
                return
            result = job.result
            for item in await run_in_threadpool(_data, result, body):
                values = {
                    "type": f"{kind}.completed",
                    **item,
                    "created_at": int(time.time()),
                    **_described(result, body),
                    "usage": _usage(result),
                    "twostep": drawing_of(result, fitted, changes),
                }
                yield server_sent(f"{kind}.completed", values)
            yield "data: [DONE]\n\n"


def _is_partial(event: Event, num_partials: int) -> bool:
    """Whether a step is one of those whose pictures are shown: evenly spread, without the last."""
    before_last = event.num_steps - 1
    chosen = {
        round(before_last * (i + 1) / num_partials) for i in range(min(num_partials, before_last))
    }
    if num_partials >= before_last:
        chosen = set(range(1, before_last + 1))
    return event.num_done in chosen


def _data(result: Result, body: ImagesBody) -> list[dict[str, Any]]:
    quality = 100 if body.output_compression is None else max(1, body.output_compression)
    format = body.format_for(result.contract.media)
    return [
        {"b64_json": in_base64(encode(result, i, format, quality=quality).data), "seed": seed}
        for i, seed in enumerate(result.seeds)
    ]


def _described(result: Result, body: ImagesBody) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": body.format_for(result.contract.media),
        "quality": body.quality or "auto",
        "size": f"{result.request.width}x{result.request.height}",
    }


def _usage(result: Result) -> dict[str, Any]:
    """Count words in, and the network's steps out: one for each step of each picture."""
    text = len(re.findall(r"\w+|[^\w\s]", result.request.prompt))
    image = 0 if result.request.image is None else 1
    steps = (result.request.steps or 0) * len(result.images)
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": steps,
        "total_tokens": text + image + steps,
    }


def _names(serving: Serving) -> list[str]:
    return [served.name for served in serving.catalogue.served]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "twostep"}


def _fields_of(form: FormData) -> dict[str, Any]:
    """Return the text fields of a form; empty ones are left out, `loras` may come several times."""
    fields: dict[str, Any] = {
        name: value for name, value in form.multi_items() if isinstance(value, str) and value
    }
    loras = [value for name in ("loras", "loras[]") for value in form.getlist(name)]
    fields["loras"] = [value for value in loras if isinstance(value, str)]
    if "controls" in fields:
        fields["controls"] = _json_in("controls", fields["controls"])
    return fields


def _json_in(name: str, text: str) -> Any:
    """Read a field of a form that holds JSON; raises RequestError where it does not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is no JSON: {error}.") from error


async def _files_of(form: FormData, name: re.Pattern[str]) -> list[bytes]:
    """Return the files whose field has this name, in order."""
    return [
        await value.read()
        for field, value in form.multi_items()
        if name.fullmatch(field) and isinstance(value, UploadFile)
    ]


def _editable(mask: Picture) -> Picture:
    """Return a mask that is white where the API's is transparent.

    One without transparency is white where it is changed already, as other programs paint it.
    """
    if mask.alpha is None:
        return mask
    return Picture.of(mask.alpha.point(lambda level: 255 if level < 128 else 0))


def _size_of(size: str | None) -> tuple[int, int] | tuple[None, None]:
    if size is None or size == "auto":
        return None, None
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f"size is {size[:80]!r}; expected WIDTHxHEIGHT in pixels, or auto.")
    return int(match[1]), int(match[2])
