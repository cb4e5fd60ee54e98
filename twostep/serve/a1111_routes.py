"""The API of A1111's web UI and its relatives, below /sdapi/v1: what their clients call.

Steps, guidance, sizes, samplers and models that are not to be had become what comes nearest, and
`info` and the header X-Twostep-Changes say what was changed. Options, progress and interruption
are those of the client that asks, not of all of them.
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import psutil
import torch
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twostep.contract import ContractError
from twostep.pipeline.provenance import A1111_CHUNK, a1111_text
from twostep.pipeline.request import SAMPLERS, RequestError, Result
from twostep.serve.a1111_controls import SCRIPT
from twostep.serve.a1111_wishes import (
    CHECKPOINT,
    SCHEDULERS,
    ImageBody,
    TextBody,
    samplers,
)
from twostep.serve.catalogue import Fitted
from twostep.serve.document import DRAWING, A1111Refusal, json_body, refusals
from twostep.serve.engine import Event, Job
from twostep.serve.following import (
    PictureFormat,
    drawing_of,
    ended,
    in_base64,
    in_header,
    preview_in_base64,
)
from twostep.serve.items import encode
from twostep.serve.serving import Serving, bytes_in, client_of, json_of, validated

_REFRESH_SECONDS = 10.0
"""How long a refresh waits for files that are being written."""

MAX_CLIENTS = 1000
"""How many clients' options are remembered; those that were seen longest ago are forgotten."""

_FORMATS: dict[str, PictureFormat] = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
"""The values of the option samples_format."""

_SETTING = re.compile(r'\s*(\w[\w \-/]*): ("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
"""One setting in the last line of the text that pictures carry."""

_EMPTY_LISTS = (
    "upscalers",
    "latent-upscale-modes",
    "sd-vae",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
    "script-info",
    "extensions",
)
"""What clients ask for a list of, and there is none of here."""


class OptionsBody(BaseModel):
    """The options that are read; clients send all of them back, also those that never change."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: str | None = None
    samples_format: str | None = None


class PngInfoBody(BaseModel):
    """A picture in base64."""

    image: str


class DrawAnswer(BaseModel):
    """What was drawn. `info` is JSON in a string, as A1111 has it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


@dataclass(eq=False)
class _Drawing:
    """A job of a client, and what is known of its progress."""

    job: Job
    start: float = field(default_factory=time.monotonic)
    last: Event | None = None
    preview: Image.Image | None = None

    def listen(self, event: Event) -> None:
        """Take note of an event; called by the thread that draws."""
        if event.kind == "step":
            self.last = event
            if event.previews:
                self.preview = event.previews[0]

    @property
    def share(self) -> float:
        """How much of it is done, in 0..1."""
        return 0.0 if self.last is None else self.last.num_done / self.last.num_steps


@dataclass
class _Desk:
    """What one client has chosen, and what is drawn for it."""

    model: str
    samples_format: str = "png"
    drawings: list[_Drawing] = field(default_factory=list)


class _Desks:
    """The desks of all clients. Used by the event loop's thread alone."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._desks: OrderedDict[str, _Desk] = OrderedDict()

    def of(self, http: HttpRequest) -> _Desk:
        """Return the desk of whoever asks."""
        client = client_of(http)
        desk = self._desks.setdefault(client, _Desk(self._model))
        self._desks.move_to_end(client)
        if len(self._desks) > MAX_CLIENTS:
            others = (name for name, each in self._desks.items() if not each.drawings)
            oldest = next(others, client)
            if oldest != client:
                del self._desks[oldest]
        return desk


def a1111_routes(serving: Serving) -> APIRouter:
    """Return the addresses below /sdapi/v1."""
    router = APIRouter(
        prefix="/sdapi/v1", tags=["A1111"], responses=refusals(422, shape=A1111Refusal)
    )
    drawn: dict[str, Any] = {
        "response_model": None,
        "responses": {200: {"model": DrawAnswer}, **refusals(*DRAWING, shape=A1111Refusal)},
    }
    catalogue = serving.catalogue
    desks = _Desks(catalogue.default.name)

    @router.post("/txt2img", openapi_extra=json_body(TextBody), **drawn)
    async def draw_text(http: HttpRequest) -> Response:
        """Draw pictures of a prompt."""
        return await _draw(serving, desks.of(http), http, TextBody)

    @router.post("/img2img", openapi_extra=json_body(ImageBody), **drawn)
    async def draw_image(http: HttpRequest) -> Response:
        """Change a picture, all of it or where the mask is white."""
        return await _draw(serving, desks.of(http), http, ImageBody)

    @router.get("/progress")
    async def progress(http: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
        """Say how far the drawings of this client are, with a preview of the one under way."""
        return await _progress(desks.of(http), with_preview=not skip_current_image)

    @router.post("/interrupt")
    async def interrupt(http: HttpRequest) -> dict[str, Any]:
        """Cancel all drawings of this client."""
        for drawing in list(desks.of(http).drawings):
            serving.engine.cancel(drawing.job)
        return {}

    @router.post("/skip")
    async def skip(http: HttpRequest) -> dict[str, Any]:
        """Cancel the drawing of this client that is under way."""
        for drawing in desks.of(http).drawings[:1]:
            serving.engine.cancel(drawing.job)
        return {}

    @router.get("/options")
    async def get_options(http: HttpRequest) -> dict[str, Any]:
        """Return the options of this client, and those that are as they are."""
        desk = desks.of(http)
        return {
            CHECKPOINT: desk.model,
            "sd_checkpoint_hash": "",
            "samples_format": desk.samples_format,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "show_progress_every_n_steps": 1,
        }

    @router.post("/options")
    async def set_options(body: OptionsBody, http: HttpRequest) -> dict[str, Any]:
        """Choose the model and the format of pictures for this client."""
        desk = desks.of(http)
        model = desk.model
        if body.sd_model_checkpoint:
            model = catalogue.find(body.sd_model_checkpoint).name
        if body.samples_format and body.samples_format not in _FORMATS:
            raise RequestError(
                f"samples_format is {body.samples_format[:80]!r}; expected {', '.join(_FORMATS)}."
            )
        desk.model = model
        desk.samples_format = body.samples_format or desk.samples_format
        return {}

    @router.get("/samplers")
    async def list_samplers() -> list[dict[str, Any]]:
        """List the samplers that teachers take; students keep to their own."""
        own = [contract.sampler for served in catalogue.served for contract in served.contracts]
        return samplers(own)

    @router.get("/schedulers")
    async def list_schedulers() -> list[dict[str, Any]]:
        """List the schedules of times, which are the models' own."""
        fixed = {"aliases": None, "default_rho": -1, "need_inner_model": False}
        return [{"name": name, "label": label, **fixed} for name, label in SCHEDULERS.items()]

    @router.get("/sd-models")
    async def list_models() -> list[dict[str, Any]]:
        """List what `sd_model_checkpoint` may be: models, and their students by name."""
        return [
            {
                "title": served.name,
                "model_name": served.name,
                "hash": None,
                "sha256": None,
                "filename": served.name,
                "config": None,
            }
            for served in catalogue.served
        ]

    @router.get("/loras")
    async def list_loras() -> list[dict[str, Any]]:
        """List what `<lora:NAME:1>` in a prompt may name."""
        return [
            {"name": name, "alias": name, "path": name, "metadata": {}} for name in catalogue.loras
        ]

    @router.post("/refresh-checkpoints")
    @router.post("/refresh-loras")
    async def refresh() -> dict[str, Any]:
        """Look at the disk at once for models and LoRAs that came, changed or went."""
        if serving.reloader is not None:
            await run_in_threadpool(serving.reloader.catch_up, _REFRESH_SECONDS)
        return {}

    for name in _EMPTY_LISTS:
        router.add_api_route(f"/{name}", _no_list, methods=["GET"], name=name)

    @router.get("/embeddings")
    async def list_embeddings() -> dict[str, Any]:
        """List no textual inversions."""
        return {"loaded": {}, "skipped": {}}

    @router.get("/scripts")
    async def list_scripts() -> dict[str, list[str]]:
        """List the one script that there is, if there are ControlNets."""
        names = [SCRIPT] if catalogue.controlnets else []
        return {"txt2img": names, "img2img": names}

    @router.get("/cmd-flags")
    async def flags() -> dict[str, Any]:
        """Return no flags."""
        return {}

    @router.get("/memory")
    async def memory() -> dict[str, Any]:
        """Return the memory of the machine and of its accelerator, in bytes."""
        return _memory()

    @router.post("/png-info")
    async def png_info(body: PngInfoBody) -> dict[str, Any]:
        """Read from a picture how it was made."""
        return await run_in_threadpool(_png_info, bytes_in("image", body.image))

    return router


async def _no_list() -> list[Any]:
    """Return an empty list: there is none of these here."""
    return []


async def _draw(serving: Serving, desk: _Desk, http: HttpRequest, kind: type[TextBody]) -> Response:
    """Draw what a body asks for, and answer when it is done."""
    values = await json_of(http)
    body = validated(kind, values)
    notes = body.notes()
    if serving.strict and notes:
        raise ContractError(f"{notes[0]}. This server is strict.")
    model = desk.model
    fitted = await serving.fit(http, lambda: body.wish(model), media=("image", "video"))
    job = serving.submit(fitted, client=client_of(http))
    drawing = _Drawing(job)
    job.follow(drawing.listen)
    desk.drawings.append(drawing)
    try:
        if not await ended(serving.engine, job, http):
            return Response(status_code=499)  # nobody reads it
    finally:
        desk.drawings.remove(drawing)
        job.unfollow(drawing.listen)
    result = job.wait(0.0)
    changes = [*notes, *fitted.changes]
    format = _FORMATS[desk.samples_format]
    pictures: list[str] = []
    if body.send_images is not False:
        pictures = await run_in_threadpool(_pictures, result, format)
    answer = {
        "images": pictures,
        "parameters": _echoed(values),
        "info": json.dumps(_info(result, fitted, changes)),
    }
    headers = {"X-Twostep-Job": job.id}
    if changes:
        headers["X-Twostep-Changes"] = in_header(changes)
    return JSONResponse(answer, headers=headers)


def _pictures(result: Result, format: PictureFormat) -> list[str]:
    """Return the files of a result in base64; clips are animated WebPs, whatever is chosen."""
    chosen = format if result.contract.media == "image" else None
    count = len(result.images)
    return [in_base64(encode(result, i, chosen, quality=90).data) for i in range(count)]


def _echoed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the body as it came, with the pictures that went in only where they are asked for."""
    if values.get("include_init_images"):
        return values
    return values | {name: None for name in ("init_images", "mask") if name in values}


def _info(result: Result, fitted: Fitted, changes: list[str]) -> dict[str, Any]:
    """Return how the pictures were made, under the names that A1111 has for it."""
    request = result.request
    count = len(result.images)
    texts = [a1111_text(result.contract, request.only(seed)) for seed in result.seeds]
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": result.seeds[0],
        "all_seeds": result.seeds,
        "subseed": result.seeds[0],
        "all_subseeds": result.seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": SAMPLERS[request.sampler or result.contract.sampler],
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": count,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": result.contract.name,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"twostep {result.contract.version}",
        "twostep": drawing_of(result, fitted, changes),
    }


async def _progress(desk: _Desk, *, with_preview: bool) -> dict[str, Any]:
    """Describe the first drawing of a desk; zeros where there is none."""
    state: dict[str, Any] = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "",
        "job_count": len(desk.drawings),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "job_no": 0,
        "sampling_step": 0,
        "sampling_steps": 0,
    }
    answer = {
        "progress": 0.0,
        "eta_relative": 0.0,
        "state": state,
        "current_image": None,
        "textinfo": None,
    }
    if not desk.drawings:
        return answer
    drawing = max(desk.drawings, key=lambda each: each.share)
    state["job"] = drawing.job.id
    share = drawing.share
    answer["progress"] = share
    if drawing.last is None:
        answer["textinfo"] = "waits"
    else:
        state["sampling_step"] = drawing.last.num_done
        state["sampling_steps"] = drawing.last.num_steps
        answer["eta_relative"] = (time.monotonic() - drawing.start) * (1 / share - 1)
    if with_preview:
        # From now on its steps bring previews: nobody pays for them who does not look.
        drawing.job.wants_previews = True
        if drawing.preview is not None:
            answer["current_image"] = await run_in_threadpool(preview_in_base64, drawing.preview)
    return answer


def _memory() -> dict[str, Any]:
    ram = psutil.virtual_memory()
    cuda: dict[str, Any] = {"error": "unavailable"}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        cuda = {"system": {"free": free, "used": total - free, "total": total}}
    return {"ram": {"free": ram.available, "used": ram.used, "total": ram.total}, "cuda": cuda}


def _png_info(data: bytes) -> dict[str, Any]:
    """Return the texts of a picture, and the settings in A1111's."""
    try:
        with Image.open(BytesIO(data)) as image:
            chunks = {name: text for name, text in image.info.items() if isinstance(text, str)}
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"image cannot be read as a picture: {error}.") from error
    text = chunks.get(A1111_CHUNK, "")
    return {"info": text, "items": chunks, "parameters": read_settings(text)}


def read_settings(text: str) -> dict[str, str]:
    """Read the text that A1111 and its relatives put into pictures.

    Returns "Prompt", "Negative prompt", and the settings of the last line by their names; a size
    also as "Size-1" and "Size-2". Empty for an empty text.
    """
    if not text:
        return {}
    *lines, last = text.strip().split("\n")
    found = _SETTING.findall(last)
    if len(found) < 3:
        lines, found = [*lines, last], []
    words = "\n".join(lines)
    prompt, _, negative = words.partition("\nNegative prompt: ")
    settings = {"Prompt": prompt, "Negative prompt": negative}
    for name, value in found:
        settings[name] = _unquoted(value.strip())
    width, times, height = settings.get("Size", "").partition("x")
    if times:
        settings |= {"Size-1": width, "Size-2": height}
    return settings


def _unquoted(value: str) -> str:
    """Return a setting without the quotes that it may stand in; as it is if they are damaged."""
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
