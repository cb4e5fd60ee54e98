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

from twostep.pipeline.provenance import read_workflow
from twostep.serve.document import refusals
from twostep.serve.engine import Event, Job
from twostep.serve.following import answer_of, encode, follow, preview_in_base64, server_sent
from twostep.serve.serving import Serving
from twostep.serve.shapes import (
    CAPABILITIES_PATH,
    JOBS_PATH,
    Capabilities,
    JobAnswer,
    JobBody,
    WorkflowAnswer,
)

_GONE = "there is no such job, or it ended long ago."


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

    async def picture(job_id: str, index: int) -> bytes:
        job = engine.find(job_id)
        data = None
        if job is None:
            data = None if store is None else await run_in_threadpool(store.image, job_id, index)
        elif job.result is not None and 0 <= index < len(job.result.images):
            data = await run_in_threadpool(encode, job.result, index, "png", 100)
        if data is None:
            raise HTTPException(404, "there is no such picture, or not yet.")
        return data

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
        """Say how a job stands, and where its pictures are."""
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
        responses={200: {"content": {"image/png": {}}}},
    )
    async def get_image(job_id: str, index: int) -> Response:
        """Return a picture of a job that is done, as a PNG that says how it was made."""
        return Response(await picture(job_id, index), media_type="image/png")

    @router.get(JOBS_PATH + "/{job_id}/images/{index}/workflow")
    async def get_workflow(job_id: str, index: int) -> WorkflowAnswer:
        """Return the graph with which ComfyUI draws a picture of a job that is done."""
        found = await run_in_threadpool(read_workflow, await picture(job_id, index))
        if found is None:
            raise HTTPException(404, "ComfyUI's own nodes cannot draw this picture.")
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
