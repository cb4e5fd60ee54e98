"""Drawings that commands of the same user on this machine hand over."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from twostep.pipeline.order import Order
from twostep.pipeline.provenance import text_chunks
from twostep.pipeline.request import Picture, Request, Result
from twostep.serve.following import ended, in_base64
from twostep.serve.handover import HANDOVER_PATH, TOKEN_HEADER
from twostep.serve.serving import Serving, bytes_in, client_of, json_of, validated

_GONE = 499
"""The client has gone; nobody reads the answer."""


class _Body(BaseModel):
    """What `handover` sends: an order, where its model lies, the folder whose files it names if it
    names some, and its pictures in base64.
    """

    model_config = ConfigDict(extra="forbid")

    order: str
    model_path: str | None
    folder: str | None
    pictures: dict[str, str]


def handover_routes(serving: Serving, token: str) -> APIRouter:
    """Return the address where drawings are handed over.

    It names files of this machine, as a command may, so it asks for a token that only programs of
    the same user can read.

    Args:
        serving: the engine and catalogue.
        token: what must be sent.
    """
    router = APIRouter(include_in_schema=False)

    @router.post(HANDOVER_PATH)
    async def draw(http: HttpRequest) -> Response:
        given = http.headers.get(TOKEN_HEADER, "")
        if not secrets.compare_digest(given.encode(errors="replace"), token.encode()):
            raise HTTPException(403, "this is for commands of the user who runs the server.")
        body = validated(_Body, await json_of(http))
        order = Order.from_json(body.order)
        problem = _why_not(serving, order, body)
        if problem is not None:
            raise HTTPException(409, problem)
        request = await run_in_threadpool(_request, order, body)
        job = serving.engine.submit(request, client=client_of(http))
        if not await ended(serving.engine, job, http):
            return Response(status_code=_GONE)
        return JSONResponse(await run_in_threadpool(_answer, job.wait()))

    return router


def _why_not(serving: Serving, order: Order, body: _Body) -> str | None:
    """Return why an order is not drawn here as it would be where it was given; None if it is."""
    here = str(Path.cwd())
    if body.folder != here and (body.folder is not None or order.depends_on_folder):
        return f"names in it mean other files there, in {here}"
    if order.model not in {served.model for served in serving.catalogue.served}:
        return f"{order.model} is not among its models"
    place = Path(order.model)
    path = str(place.resolve()) if place.exists() else None
    return None if path == body.model_path else f"{order.model} is another model there"


def _request(order: Order, body: _Body) -> Request:
    def opened(path: str) -> Picture:
        return replace(Picture.of(bytes_in("pictures", body.pictures[path])), name=Path(path).name)

    return order.request(opened)


def _answer(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it."""
    files = []
    for index, seed in enumerate(result.seeds):
        encoded = result.to_file(result.images[index], text_chunks(result, index))
        data = in_base64(encoded.data)
        files.append({"seed": seed, "suffix": encoded.suffix, "data": data})
    return {
        "files": files,
        "prompt": result.request.prompt,
        "checkpoint": result.contract.name,
        "seconds": result.seconds,
        "warnings": result.warnings,
    }
