"""What every family of addresses needs: the engine, the catalogue, and how jobs are made."""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from twostep.errors import TwostepError
from twostep.pipeline.request import Control, Picture, RequestError
from twostep.serve.catalogue import Catalogue, Fitted, Wish, random_seed
from twostep.serve.engine import Engine, EngineError, Job, new_job_id
from twostep.serve.logs import JobLog
from twostep.serve.metrics import Metrics
from twostep.serve.reloading import Reloader
from twostep.serve.shapes import JOBS_PATH, SPEECH_PATH, ControlBody, JobAnswer, JobBody
from twostep.serve.store import JobStore, StoredJob

MAX_DEPTH = 100
"""How deep a body may be nested."""

_ADDRESSES = {
    "image": "/v1/images/generations",
    "video": "/v1/images/generations",
    "audio": SPEECH_PATH,
}
"""Where else than at the server's own API a medium can be had."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a letter, as JSON writes it; one half alone is no text."""

_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class Serving:
    """A server's engine and catalogue, and whether it refuses what it would have to change.

    `metrics`, `store` and `log`, where there are such, are observers of the engine; `reloader`
    looks for models that have changed.
    """

    engine: Engine
    catalogue: Catalogue
    strict: bool = False
    metrics: Metrics | None = None
    store: JobStore | None = None
    log: JobLog | None = None
    reloader: Reloader | None = None

    async def fit(
        self, http: HttpRequest, make: Callable[[], Wish], *, media: Sequence[str]
    ) -> Fitted:
        """Make a wish, which may open pictures, in another thread, and fit it.

        Args:
            http: the request that asks.
            make: returns the wish.
            media: what can be sent at its address, as contracts call it.

        Raises what `Catalogue.fit` raises, and RequestError for pictures, and for a model of media
        that are not sent there.
        """
        wish = await run_in_threadpool(make)
        fitted = self.catalogue.fit(wish, strict=self.strict)
        served = fitted.served
        if served.media not in media:
            elsewhere = _ADDRESSES.get(served.media)
            asked = JOBS_PATH if elsewhere is None else f"{elsewhere} or {JOBS_PATH}"
            raise RequestError(
                f"{served.name} makes {served.contracts[0].things}, which {http.url.path} does "
                f"not send. Ask {asked}, or another model."
            )
        return fitted

    def submit(self, fitted: Fitted, *, client: str, id: str | None = None, **wishes: Any) -> Job:
        """Queue a request, so that the log knows which of HTTP it came with.

        `wishes` are those of `Engine.submit`, and so is what is raised.
        """
        job_id = id or new_job_id()
        if self.log is not None:
            # Before the engine has it, for the job may end at once.
            self.log.expect(job_id)
        try:
            return self.engine.submit(fitted.request, client=client, id=job_id, **wishes)
        except EngineError:
            if self.log is not None:
                self.log.forget(job_id)
            raise

    async def accept_body(self, http: HttpRequest, body: JobBody) -> Job:
        """Queue a job of the server's own API, which is written down first where there is a store.

        Raises what `Catalogue.fit` and `Engine.submit` raise, RequestError for pictures, and
        StoreError.
        """
        if body.seed is None:
            body = body.model_copy(update={"seed": random_seed()})
        wish = await run_in_threadpool(wish_of, body)
        fitted = self.catalogue.fit(wish, strict=True)
        job_id = new_job_id()
        client = client_of(http)
        if self.store is not None:
            await run_in_threadpool(self.store.add, StoredJob(job_id, client, body))
        try:
            return self._submit(job_id, client, body, fitted)
        except EngineError:
            if self.store is not None:
                self.store.drop(job_id)
            raise

    def resume(self) -> int:
        """Queue what the store has unfinished, and return how many jobs that are.

        What cannot be drawn any more is written down as failed.
        """
        stored = [] if self.store is None else self.store.unfinished()
        for job in stored:
            try:
                fitted = self.catalogue.fit(wish_of(job.body), strict=True)
            except TwostepError as error:
                answer = JobAnswer(
                    id=job.id,
                    state="failed",
                    seed=job.body.seed or 0,
                    events=f"{JOBS_PATH}/{job.id}/events",
                    error=str(error),
                )
                assert self.store is not None
                self.store.finish(answer)
                continue
            self._submit(job.id, job.client, job.body, fitted, even_if_full=True)
        return len(stored)

    def _submit(
        self, job_id: str, client: str, body: JobBody, fitted: Fitted, *, even_if_full: bool = False
    ) -> Job:
        return self.submit(
            fitted,
            client=client,
            id=job_id,
            wants_previews=body.previews,
            seconds=body.seconds,
            even_if_full=even_if_full,
        )


def wish_of(body: JobBody) -> Wish:
    """Return what a job of the server's own API draws; raises RequestError for its pictures."""
    if (body.width is None) != (body.height is None):
        raise RequestError("a width needs a height, and a height a width.")
    return Wish(
        body.prompt,
        model=body.model,
        num_images=body.num_images,
        seed=random_seed() if body.seed is None else body.seed,
        steps=body.steps,
        guidance=body.guidance,
        negative_prompt=body.negative_prompt,
        width=body.width,
        height=body.height,
        image=picture_in("image", body.image),
        strength=body.strength,
        mask=picture_in("mask", body.mask),
        controls=controls_of(body.controls),
        sampler=body.sampler,
        loras=body.loras,
        decoder=body.decoder,
        frames=body.frames,
    )


def controls_of(bodies: Sequence[ControlBody]) -> tuple[Control, ...]:
    """Open the pictures of ControlNets; raises RequestError for them, and for impossible shares."""
    return tuple(
        Control(
            Picture.of(bytes_in(f"controls.{place}.picture", body.picture)),
            body.name,
            scale=body.scale,
            start=body.start,
            end=body.end,
        )
        for place, body in enumerate(bodies)
    )


def client_of(http: HttpRequest) -> str:
    """Return whose turn a request takes: what it calls itself, or the address it comes from."""
    name = http.headers.get("x-twostep-client")
    if name:
        return name[:100]
    return http.client.host if http.client else ""


async def json_of(http: HttpRequest) -> Any:
    """Return the body of a request, which can be sent back as it came.

    Raises RequestError where it is no JSON, is no UTF-8 inside, has numbers that are not finite, or
    is nested too deep.
    """
    body = await http.body()
    try:
        values = json.loads(body, parse_float=_finite, parse_constant=_finite)
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deep(values):
            raise ValueError(f"it is nested more than {MAX_DEPTH} times")
        if _SURROGATE.search(body):
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}.") from error


def _finite(text: str) -> float:
    """Return a number of JSON; raises ValueError for NaN and infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _is_deep(values: object) -> bool:
    """Whether lists and objects stand in each other more than MAX_DEPTH times."""
    level = [values]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = inner
    return any(isinstance(each, list | dict) for each in level)


def validated(kind: type[_Body], values: object) -> _Body:
    """Return values as a body of some kind; raises RequestError with the field that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise RequestError(f"{place}: {first['msg']}.") from error


def picture_in(name: str, text: str | None) -> Picture | None:
    """Open the picture that a field holds in base64, with the prefix of a data: address or without.

    Raises RequestError where it is none, or too small or too large.
    """
    return None if text is None else Picture.of(bytes_in(name, text))


def bytes_in(name: str, text: str) -> bytes:
    """Read the base64 of a field, with the prefix of a data: address or without."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64; send a PNG, JPEG or WebP in it.") from error


def picture_of(data: bytes | None) -> Picture | None:
    """Open an uploaded picture; raises RequestError where it is none, or too small or large."""
    return None if data is None else Picture.of(data)
