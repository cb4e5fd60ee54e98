"""The web application: addresses, errors and the end."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest

from twostep import __version__
from twostep.errors import TwostepError
from twostep.serve.a1111_controls import control_routes
from twostep.serve.a1111_routes import a1111_routes
from twostep.serve.catalogue import UnknownModelError
from twostep.serve.engine import (
    CancelledError,
    ClosingError,
    EngineError,
    LateError,
    QueueFullError,
)
from twostep.serve.gate import Gate, Rules
from twostep.serve.handover_routes import handover_routes
from twostep.serve.native_routes import native_routes
from twostep.serve.openai_routes import openai_routes
from twostep.serve.openai_sound_routes import openai_sound_routes
from twostep.serve.operation_routes import operation_routes
from twostep.serve.page_routes import page_routes
from twostep.serve.picture_filter import RefusedPictureError
from twostep.serve.refusals import code_of, refusal
from twostep.serve.serving import Serving
from twostep.serve.tracing import HEADER, Traced

_STATUS: tuple[tuple[type[TwostepError], int], ...] = (
    (UnknownModelError, 404),
    (QueueFullError, 429),
    (ClosingError, 503),
    (LateError, 504),
    (CancelledError, 409),
    (RefusedPictureError, 400),
    (EngineError, 500),
    (TwostepError, 400),
)
"""The status of an error: that of the first class that it is of."""

_CODES = {404: "model_not_found", 429: "queue_full"}
"""Words for programs, by status."""


def create_app(
    serving: Serving,
    rules: Rules,
    *,
    drain_seconds: float = 30.0,
    with_mcp: bool = False,
    log_prompts: bool = False,
    at_end: Sequence[Callable[[], None]] = (),
    handover_token: str | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        serving: the engine and catalogue that it serves; engine and store are closed with it.
        rules: what is let in.
        drain_seconds: how long jobs may still be drawn at the end.
        with_mcp: whether language models get tools, which needs the extra `mcp`.
        log_prompts: whether the log may have what exceptions say, which may quote a prompt.
        at_end: what else is closed once the last job has ended.
        handover_token: what commands of the same user send with what they hand over; without it
            nothing can be handed over.
    """
    tools = None
    if with_mcp:
        # The extra may be missing where nobody wants this.
        from twostep.serve.mcp_tools import mcp_routes, mcp_server

        tools = mcp_server(serving)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if tools is not None:
                await stack.enter_async_context(tools.session_manager.run())
            yield
        await run_in_threadpool(serving.engine.close, drain_seconds)
        if serving.store is not None:
            serving.store.close()
        for close in at_end:
            await run_in_threadpool(close)

    # The interactive pages of FastAPI load scripts from other hosts.
    app = FastAPI(
        title="twostep", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    # The last is the outermost.
    app.add_middleware(Gate, rules=rules)
    if rules.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(rules.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Twostep-Client", HEADER],
            expose_headers=["X-Twostep-Job", "X-Twostep-Changes", "Retry-After", HEADER],
        )
    app.add_middleware(Traced, with_prompts=log_prompts)
    app.include_router(page_routes())
    app.include_router(openai_routes(serving))
    app.include_router(openai_sound_routes(serving))
    app.include_router(a1111_routes(serving))
    app.include_router(control_routes(serving))
    app.include_router(native_routes(serving))
    app.include_router(operation_routes(serving))
    if handover_token is not None:
        app.include_router(handover_routes(serving, handover_token))

    if tools is not None:
        app.router.routes.extend(mcp_routes(tools))

    @app.exception_handler(TwostepError)
    async def explain(http: HttpRequest, error: TwostepError) -> JSONResponse:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        headers = {}
        if isinstance(error, QueueFullError):
            headers["Retry-After"] = str(error.retry_after)
        code = code_of(error) or _CODES.get(status)
        body = refusal(http.url.path, status, str(error), code=code)
        return JSONResponse(body, status, headers=headers)

    @app.exception_handler(HTTPException)
    async def refuse(http: HttpRequest, error: HTTPException) -> JSONResponse:
        body = refusal(http.url.path, error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def reject(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        body = refusal(http.url.path, 422, f"{place}: {first['msg']}.", param=place)
        return JSONResponse(body, 422)

    return app
