"""A job's events for a connection, and what of a result travels over it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, Literal

from PIL import Image
from starlette.requests import Request as HttpRequest

from twostep.media.png import encode_png
from twostep.pipeline.request import Result
from twostep.serve.catalogue import Fitted
from twostep.serve.engine import Engine, Event, Job
from twostep.serve.items import poster_of, seconds_of
from twostep.serve.refusals import code_of
from twostep.serve.shapes import JOBS_PATH, JobAnswer

PictureFormat = Literal["png", "jpeg", "webp"]
"""What pictures are sent as."""


class EventQueue(asyncio.Queue[Event | None]):
    """The events of a job, for the loop that was running when it was made.

    With `listen` as the `listener` of `Engine.submit` it misses none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = asyncio.get_running_loop()

    def listen(self, event: Event) -> None:
        """Take an event, in the thread in which it happens."""
        # The loop is closed where the server has stopped: then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._running.call_soon_threadsafe(self.put_nowait, event)


async def follow(
    engine: Engine,
    job: Job,
    http: HttpRequest,
    *,
    is_owner: bool,
    queue: EventQueue | None = None,
) -> AsyncGenerator[Event, None]:
    """Yield the events of a job until it ends or the client has gone.

    With `is_owner` nobody else waits for the job: it is cancelled when the client goes. With a
    `queue` that listens since the job was submitted, no previews are missed.
    """
    with _listening(job, queue) as queue:

        async def until_gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            queue.put_nowait(None)

        gone = asyncio.create_task(until_gone())
        try:
            while (event := await queue.get()) is not None:
                yield event
                if event.is_end:
                    return
        finally:
            gone.cancel()
            if is_owner:
                engine.cancel(job)


async def events_of(job: Job) -> AsyncGenerator[Event, None]:
    """Yield the events of a job until it ends."""
    with _listening(job) as queue:
        while (event := await queue.get()) is not None:
            yield event
            if event.is_end:
                return


@contextlib.contextmanager
def _listening(job: Job, queue: EventQueue | None = None) -> Iterator[EventQueue]:
    """Let a queue listen to a job in the block; one that listens already may be given."""
    if queue is None:
        queue = EventQueue()
        job.follow(queue.listen)
    try:
        yield queue
    finally:
        job.unfollow(queue.listen)


async def ended(engine: Engine, job: Job, http: HttpRequest) -> bool:
    """Wait until a job ends, for its owner; False if the client went before."""
    async with contextlib.aclosing(follow(engine, job, http, is_owner=True)) as events:
        async for event in events:
            if event.is_end:
                return True
    return False


def in_base64(data: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(data).decode()


def preview_in_base64(image: Image.Image) -> str:
    """Return a preview as a PNG in base64."""
    return in_base64(encode_png(image, {}))


def server_sent(kind: str, values: Mapping[str, Any]) -> str:
    """Return one server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(values)}\n\n"


def in_header(sentences: list[str]) -> str:
    """Return sentences as the value of a header: one line of printable ASCII, others as escapes.

    Sentences quote clients, and a server sends no answer at all with another value.
    """
    line = " ".join("; ".join(sentences).split())
    return "".join(
        letter if " " <= letter <= "~" else letter.encode("unicode_escape").decode()
        for letter in line
    )


def milliseconds(result: Result) -> dict[str, int]:
    """Return the time of every stage, in whole milliseconds rounded up."""
    return {stage: math.ceil(1000 * seconds) for stage, seconds in result.seconds.items()}


def drawing_of(result: Result, fitted: Fitted, changes: list[str]) -> dict[str, Any]:
    """Return what really was drawn, for which the APIs of others have no field."""
    return {
        "model": fitted.served.name,
        "checkpoint": result.contract.name,
        "media": result.contract.media,
        "steps": result.request.steps,
        "guidance": result.request.guidance,
        "milliseconds": milliseconds(result),
        "changes": changes,
        "warnings": result.warnings,
    }


def answer_of(job: Job) -> JobAnswer:
    """Return how a job stands, in the shape of the server's own API."""
    path = f"{JOBS_PATH}/{job.id}"
    answer = JobAnswer(id=job.id, state=job.state, seed=job.request.seed, events=f"{path}/events")
    if job.error is not None:
        answer.error = str(job.error)
        answer.code = code_of(job.error)
    result = job.result
    if result is None:
        return answer
    images = [f"{path}/images/{i}" for i in range(len(result.images))]
    has_posters = poster_of(result.images[0]) is not None
    return answer.model_copy(
        update={
            "images": images,
            "media": result.contract.media,
            "posters": [f"{image}/poster" for image in images] if has_posters else None,
            "duration_seconds": seconds_of(result.images[0]),
            "frames": result.request.frames,
            "seeds": result.seeds,
            "checkpoint": result.contract.name,
            "steps": result.request.steps,
            "guidance": result.request.guidance,
            "width": result.request.width,
            "height": result.request.height,
            "milliseconds": milliseconds(result),
            "warnings": result.warnings,
        }
    )
