"""The server's own API: jobs that are posted, followed, fetched and cancelled.

Nothing is changed here: what a model cannot do is refused with what it can. `/api/v1/capabilities`
says that beforehand.
"""

import base64
import binascii
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twostep.pipeline.request import MAX_BATCH, NUM_DISTINCT_SEEDS, RequestError
from twostep.serve.catalogue import Wish
from twostep.serve.engine import Event, Job
from twostep.serve.following import (
    encode,
    follow,
    milliseconds,
    preview_in_base64,
    server_sent,
)
from twostep.serve.serving import Serving, picture_of

_PATH = "/api/v1/jobs"


class JobBody(BaseModel):
    """A job as it is posted. What is left out is the model's own; a seed is then picked.

    `image` and `mask` are files in base64; the mask is white where the image is changed. `previews`
    brings a small picture with every step. After `seconds` the job fails if it is not done.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    num_images: int = Field(default=1, ge=1, le=MAX_BATCH)
    seed: int | None = Field(default=None, ge=0, lt=2**63 - MAX_BATCH)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    negative_prompt: str = ""
    width: int | None = Field(default=None, ge=1, le=2**16)
    height: int | None = Field(default=None, ge=1, le=2**16)
    image: str | None = None
    strength: float | None = Field(default=None, gt=0, le=1)
    mask: str | None = None
    loras: tuple[str, ...] = ()
    previews: bool = False
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def wish(self) -> Wish:
        """Return what is to be drawn."""
        if (self.width is None) != (self.height is None):
            raise RequestError("a width needs a height, and a height a width.")
        seed = self.seed
        if seed is None:
            seed = secrets.randbelow(NUM_DISTINCT_SEEDS - MAX_BATCH)
        return Wish(
            self.prompt,
            model=self.model,
            num_images=self.num_images,
            seed=seed,
            steps=self.steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            image=picture_of(_bytes_of("image", self.image)),
            strength=self.strength,
            mask=picture_of(_bytes_of("mask", self.mask)),
            loras=self.loras,
        )


def native_routes(serving: Serving) -> APIRouter:
    """Return the addresses below /api/v1, and /health."""
    router = APIRouter(tags=["twostep"])
    engine = serving.engine

    def find(job_id: str) -> Job:
        job = engine.find(job_id)
        if job is None:
            raise HTTPException(404, "there is no such job, or it ended long ago.")
        return job

    @router.get("/health")
    def health() -> JSONResponse:
        """Say whether jobs are taken, and how many wait."""
        state = {
            "status": "ok" if engine.is_alive else "closing",
            "waiting": engine.num_waiting,
            "drawing": engine.num_drawing,
        }
        return JSONResponse(state, status_code=200 if engine.is_alive else 503)

    @router.get("/api/v1/capabilities")
    def capabilities() -> dict[str, Any]:
        """Say what can be asked for, as the contracts of the models have it."""
        return serving.catalogue.describe()

    @router.post(_PATH, status_code=202)
    async def post_job(body: JobBody, http: HttpRequest) -> JSONResponse:
        """Queue a job."""
        job, _ = await serving.accept(
            http, body.wish, strict=True, wants_previews=body.previews, seconds=body.seconds
        )
        return JSONResponse(_described(job), 202, headers={"Location": f"{_PATH}/{job.id}"})

    @router.get(_PATH + "/{job_id}")
    def get_job(job_id: str) -> dict[str, Any]:
        """Say how a job stands, and where its pictures are."""
        return _described(find(job_id))

    @router.delete(_PATH + "/{job_id}")
    def cancel_job(job_id: str) -> dict[str, Any]:
        """End a job; one that has ended stays as it is."""
        job = find(job_id)
        engine.cancel(job)
        return _described(job)

    @router.get(_PATH + "/{job_id}/images/{index}")
    async def get_image(job_id: str, index: int) -> Response:
        """Return a picture of a job that is done, as a PNG that says how it was made."""
        result = find(job_id).result
        if result is None or not 0 <= index < len(result.images):
            raise HTTPException(404, "there is no such picture, or not yet.")
        data = await run_in_threadpool(encode, result, index, "png", 100)
        return Response(data, media_type="image/png")

    @router.get(_PATH + "/{job_id}/events")
    async def get_events(job_id: str, http: HttpRequest) -> StreamingResponse:
        """Send what has happened to a job and what happens until it ends."""
        job = find(job_id)

        async def events() -> AsyncIterator[str]:
            following = follow(engine, job, http, is_owner=False)
            async with contextlib.aclosing(following):
                async for event in following:
                    values = await run_in_threadpool(_event, job, event)
                    yield server_sent(event.kind, values)

        return StreamingResponse(events(), media_type="text/event-stream")

    return router


def _described(job: Job) -> dict[str, Any]:
    """Return how a job stands, as plain values."""
    path = f"{_PATH}/{job.id}"
    described: dict[str, Any] = {
        "id": job.id,
        "state": job.state,
        "seed": job.request.seed,
        "events": f"{path}/events",
    }
    if job.error is not None:
        described["error"] = str(job.error)
    result = job.result
    if result is not None:
        described |= {
            "images": [f"{path}/images/{i}" for i in range(len(result.images))],
            "seeds": result.seeds,
            "checkpoint": result.contract.name,
            "steps": result.request.steps,
            "guidance": result.request.guidance,
            "width": result.request.width,
            "height": result.request.height,
            "milliseconds": milliseconds(result),
            "warnings": result.warnings,
        }
    return described


def _event(job: Job, event: Event) -> dict[str, Any]:
    """Return an event as plain values."""
    if event.is_end:
        return _described(job)
    if event.kind == "queued":
        return {"id": job.id, "position": event.position}
    return {
        "id": job.id,
        "num_done": event.num_done,
        "num_steps": event.num_steps,
        "seeds": list(event.seeds),
        "previews": [preview_in_base64(image) for image in event.previews],
    }


def _bytes_of(name: str, text: str | None) -> bytes | None:
    """Read base64, with the prefix of a data: address or without."""
    if text is None:
        return None
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64; send a PNG, JPEG or WebP in it.") from error
