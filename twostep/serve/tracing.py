"""Every request has an id: in the log, in the answer's header, and in errors."""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twostep.serve.refusals import REQUEST_ID, refusal

HEADER = "x-request-id"

_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Ids of clients that are taken over: they can break no log, no header and no page."""

_QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""What machines ask every few seconds; it is logged at the level "debug"."""

_MAX_PATH_LETTERS = 200

_LEFT = 499
"""The status in the log for a client that left before it had asked; nginx began with it."""

_log = logging.getLogger(__name__)


class Traced:
    """ASGI middleware that gives requests their ids, logs them, and answers for faults.

    Args:
        app: what answers.
        with_prompts: whether the log may have what exceptions say, which may quote a prompt.
    """

    def __init__(self, app: ASGIApp, *, with_prompts: bool = False) -> None:
        self._app = app
        self._with_prompts = with_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it once it has been answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SANE.fullmatch(given) else uuid4().hex
        token = REQUEST_ID.set(request_id)
        start = time.monotonic()
        status = 0

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, traced)
        except ClientDisconnect:
            status = status or _LEFT
        except Exception as error:
            self._log_fault(scope, error)
            if status:
                raise
            await _fail(scope["path"], traced)
        finally:
            self._log_request(scope, status, time.monotonic() - start)
            REQUEST_ID.reset(token)

    def _log_request(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        client = scope.get("client")
        values = {
            "method": scope["method"],
            "path": path[:_MAX_PATH_LETTERS],
            "status": status,
            "milliseconds": round(1000 * seconds, 1),
            "client": client[0] if client else "",
        }
        level = logging.DEBUG if path in _QUIET_PATHS else logging.INFO
        _log.log(level, "request", extra=values)

    def _log_fault(self, scope: Scope, error: Exception) -> None:
        """Log where a fault arose, and what it says only if it may be logged."""
        lines = traceback.format_tb(error.__traceback__)
        said = f": {error}" if self._with_prompts else ""
        values = {
            "path": scope["path"][:_MAX_PATH_LETTERS],
            "error": f"{type(error).__name__}{said}",
            "traceback": "".join(lines),
        }
        _log.error("request failed", extra=values)


async def _fail(path: str, send: Send) -> None:
    body = json.dumps(refusal(path, 500, "the server failed; its log says more.")).encode()
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": body})
