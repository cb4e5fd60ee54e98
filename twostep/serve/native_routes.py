"""The server's own API: jobs that are posted, followed, fetched and cancelled.

Nothing is changed here: what a model cannot do is refused with what it can. `/api/v1/capabilities`
says that beforehand.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from twostep.media.codec import Encoded
from twostep.media.png import encode_png
from twostep.pipeline.provenance import read_workflow
from twostep.pipeline.request import Result
from twostep.serve.document import refusals
from twostep.serve.engine import Event, Job
from twostep.serve.following import answer_of, follow, preview_in_base64, server_sent
from twostep.serve.items import encode, poster_of
from twostep.serve.serving import Serving
from twostep.serve.shapes import (
    CAPABILITIES_PATH,
    JOBS_PATH,
    SUFFIXES,
    Capabilities,
    JobAnswer,
    JobBody,
    WorkflowAnswer,
    file_stem,
)
from twostep.serve.store import StoredItem

_GONE = "there is no such job, or it ended long ago."
_NOT_THERE = "there is no such picture, or not yet."


def native_routes(serving: Serving) -> APIRouter:
    """Return the addresses below /api/v1."""
    router = APIRouter(tags=["twostep"], responses=refusals(422))
    engine = serving.engine
    store = serving.store

    def stand(job_id: str) -> JobAnswer:
        job = engine.find(job_id)
        if job is not None:
            return answer_of(job)
        stored = None if store is None else store.find(job_id)
        if stored is None:
            raise HTTPException(404, _GONE)
        return stored

    def made(job_id: str, index: int) -> Result | None:
        """Return the result of a job that is still in memory; raises 404 without such an item."""
        job = engine.find(job_id)
        if job is None:
            return None
        if job.result is None or not 0 <= index < len(job.result.images):
            raise HTTPException(404, _NOT_THERE)
        return job.result

    async def stored(job_id: str, index: int) -> StoredItem:
        item = None if store is None else await run_in_threadpool(store.item, job_id, index)
        if item is None:
            raise HTTPException(404, _NOT_THERE)
        return item

    async def item(job_id: str, index: int, format: str | None = None) -> Encoded:
        result = made(job_id, index)
        if result is not None:
            return await run_in_threadpool(encode, result, index, format)
        file = (await stored(job_id, index)).file
        medium = file.mime.partition("/")[0]
        if format is not None and SUFFIXES.get(f"{medium}/{format}") != file.suffix:
            raise HTTPException(
                404, f"of this job only a {file.suffix} is left; ask for it without a format."
            )
        return file

    @router.get(CAPABILITIES_PATH)
    def capabilities() -> Capabilities:
        """Say what can be asked for, as the contracts of the models have it."""
        return Capabilities.model_validate(serving.catalogue.describe())

    @router.post(
        JOBS_PATH,
        status_code=202,
        response_model=JobAnswer,
        response_model_exclude_none=True,
        responses=refusals(429, 503),
    )
    async def post_job(body: JobBody, http: HttpRequest) -> JSONResponse:
        """Queue a job."""
        job = await serving.accept_body(http, body)
        headers = {"Location": f"{JOBS_PATH}/{job.id}"}
        return JSONResponse(answer_of(job).model_dump(exclude_none=True), 202, headers=headers)

    @router.get(JOBS_PATH + "/{job_id}", response_model_exclude_none=True)
    def get_job(job_id: str) -> JobAnswer:
        """Say how a job stands, and where what it made is."""
        return stand(job_id)

    @router.delete(JOBS_PATH + "/{job_id}", response_model_exclude_none=True)
    def cancel_job(job_id: str) -> JobAnswer:
        """End a job; one that has ended stays as it is."""
        job = engine.find(job_id)
        if job is not None:
            engine.cancel(job)
        return stand(job_id)

    @router.get(
        JOBS_PATH + "/{job_id}/images/{index}",
        response_class=Response,
        responses={200: {"content": {mime: {} for mime in SUFFIXES}}},
    )
    async def get_image(job_id: str, index: int, format: str | None = None) -> Response:
        """Return what a job made, as a file that says how it was made: a picture, clip or sound.

        Without a format it is a PNG, an animated WebP or a WAV; capabilities list the others.
        """
        file = await item(job_id, index, format)
        answer = stand(job_id)
        name = file_stem(answer.checkpoint or "", (answer.seeds or [answer.seed])[index])
        named = {"Content-Disposition": f'inline; filename="{name}{file.suffix}"'}
        return Response(file.data, media_type=file.mime, headers=named)

    @router.get(
        JOBS_PATH + "/{job_id}/images/{index}/poster",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}},
    )
    async def get_poster(job_id: str, index: int) -> Response:
        """Return what is shown of a sound or a clip, as a PNG: spectrogram or first frame."""
        result = made(job_id, index)
        if result is None:
            data = (await stored(job_id, index)).poster
        else:
            data = await run_in_threadpool(_poster, result, index)
        if data is None:
            raise HTTPException(404, "it is a picture itself.")
        return Response(data, media_type="image/png")

    @router.get(JOBS_PATH + "/{job_id}/images/{index}/workflow")
    async def get_workflow(job_id: str, index: int) -> WorkflowAnswer:
        """Return the graph with which ComfyUI draws a picture of a job that is done."""
        file = await item(job_id, index)
        found = None
        if file.mime == "image/png":
            found = await run_in_threadpool(read_workflow, file.data)
        if found is None:
            raise HTTPException(404, "ComfyUI's own nodes cannot draw this.")
        return WorkflowAnswer(prompt=found.prompt, workflow=found.page, inputs=found.inputs)

    @router.get(
        JOBS_PATH + "/{job_id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def get_events(job_id: str, http: HttpRequest) -> StreamingResponse:
        """Send what has happened to a job and what happens until it ends."""
        job = engine.find(job_id)
        if job is None:
            answer = stand(job_id)
            last = server_sent(answer.state, answer.model_dump(exclude_none=True))
            return StreamingResponse(iter([last]), media_type="text/event-stream")

        async def events() -> AsyncIterator[str]:
            following = follow(engine, job, http, is_owner=False)
            async with contextlib.aclosing(following):
                async for event in following:
                    values = await run_in_threadpool(_event, job, event)
                    yield server_sent(event.kind, values)

        return StreamingResponse(events(), media_type="text/event-stream")

    return router


def _poster(result: Result, index: int) -> bytes | None:
    """Return the picture of an item as a PNG, None where it needs none."""
    poster = poster_of(result.images[index])
    return None if poster is None else encode_png(poster, {})


def _event(job: Job, event: Event) -> dict[str, Any]:
    """Return an event as plain values."""
    if event.is_end:
        return answer_of(job).model_dump(exclude_none=True)
    if event.kind == "queued":
        return {"id": job.id, "position": event.position}
    return {
        "id": job.id,
        "num_done": event.num_done,
        "num_steps": event.num_steps,
        "seeds": list(event.seeds),
        "previews": [preview_in_base64(image) for image in event.previews],
    }
