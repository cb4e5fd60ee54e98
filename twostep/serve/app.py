"""The web application: addresses, errors and the end."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from twostep import __version__
from twostep.errors import TwostepError
from twostep.serve.catalogue import UnknownModelError
from twostep.serve.engine import (
    CancelledError,
    ClosingError,
    EngineError,
    LateError,
    QueueFullError,
)
from twostep.serve.gate import Gate, Rules
from twostep.serve.native_routes import native_routes
from twostep.serve.openai_routes import openai_routes
from twostep.serve.serving import Serving

_STATUS: tuple[tuple[type[TwostepError], int], ...] = (
    (UnknownModelError, 404),
    (QueueFullError, 429),
    (ClosingError, 503),
    (LateError, 504),
    (CancelledError, 409),
    (EngineError, 500),
    (TwostepError, 400),
)
"""The status of an error: that of the first class that it is of."""

_log = logging.getLogger(__name__)


def create_app(serving: Serving, rules: Rules, *, drain_seconds: float = 30.0) -> FastAPI:
    """Return the application.

    Args:
        serving: the engine and catalogue that it serves; the engine is closed with it.
        rules: what is let in.
        drain_seconds: how long jobs may still be drawn at the end.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(serving.engine.close, drain_seconds)

    # The interactive pages of FastAPI load scripts from other hosts.
    app = FastAPI(
        title="twostep", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    app.add_middleware(Gate, rules=rules)
    app.include_router(openai_routes(serving))
    app.include_router(native_routes(serving))

    @app.exception_handler(TwostepError)
    async def explain(_: HttpRequest, error: TwostepError) -> JSONResponse:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        headers = {}
        if isinstance(error, QueueFullError):
            headers["Retry-After"] = str(error.retry_after)
        code = "queue_full" if status == 429 else "model_not_found" if status == 404 else None
        return _error(status, str(error), code=code, headers=headers)

    @app.exception_handler(HTTPException)
    async def refuse(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def reject(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return _error(422, f"{place}: {first['msg']}.", param=place)

    @app.exception_handler(Exception)
    async def fail(http: HttpRequest, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", http.method, http.url.path, exc_info=error)
        return _error(500, "the server failed; its log says more.")

    return app


def _error(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Return an error in the OpenAI API's shape, which all addresses share."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    error: dict[str, Any] = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers=headers)
