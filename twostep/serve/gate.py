"""Who may come in, and with how much: checked before a request's body is read.

Without a key the server answers programs of its own machine alone. A web page in a browser there
could ask too, also under a name that it made to point here; so names and origins are checked.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twostep.serve.config import MAX_BODY
from twostep.serve.page_routes import PAGE_FILES
from twostep.serve.refusals import A1111_PREFIX, refusal

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of the machine itself."""

OPEN_PATHS = frozenset({"/healthz", "/readyz", *PAGE_FILES})
"""Addresses that are answered without a key."""


@dataclass(frozen=True)
class Rules:
    """What is let in.

    - `key`: what clients must send as `Authorization: Bearer KEY`, or as the password of HTTP
      Basic; None if they need none, and then the names in `hosts` alone are answered.
    - `origins`: those of web pages that may ask, beside the server's own.
    - `max_body`: bytes of a request.
    - `body_seconds`: how long a client may leave the server waiting for more of a request.
    """

    key: str | None = field(default=None, repr=False)
    hosts: frozenset[str] = LOOPBACK
    origins: frozenset[str] = frozenset()
    max_body: int = MAX_BODY
    body_seconds: float = 30.0


class Gate:
    """ASGI middleware that refuses what the rules do not let in."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401, 403, 408 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await _refuse(send, scope["path"], *refused)
            return
        num_read = 0
        is_whole = False

        async def counted() -> Message:
            nonlocal num_read, is_whole
            try:
                # Once it is whole, what comes is that the client leaves, and that may take long.
                async with asyncio.timeout(None if is_whole else self._rules.body_seconds):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, "the rest of the request did not come.") from error
            is_whole = not message.get("more_body", False)
            num_read += len(message.get("body", b""))
            if num_read > self._rules.max_body:
                raise HTTPException(413, self._too_large())
            return message

        await self._app(scope, counted, send)

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the sentence for what is not let in, None for what is."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._rules.max_body:
            return 413, self._too_large()
        authorization = headers.get("authorization", "")
        if self._rules.key is None:
            if _name_of(f"//{headers.get('host', '')}") not in self._rules.hosts:
                return 403, "this server answers to the names of its own machine alone."
            may_be_forged = True
        else:
            if path not in OPEN_PATHS and not _holds(authorization, self._rules.key):
                return 401, "this server needs its key: Authorization: Bearer KEY."
            # A browser that was once told a password sends it along for pages of others too.
            may_be_forged = authorization[:5].lower() == "basic"
        if may_be_forged and not self._is_own(headers):
            return 403, "this server draws for no pages of other origins."
        return None

    def _is_own(self, headers: Headers) -> bool:
        """Whether a request comes from no page of another origin than those that may ask."""
        origin = headers.get("origin")
        if origin is None or origin in self._rules.origins:
            return True
        return urlsplit(origin).netloc == headers.get("host", "")

    def _too_large(self) -> str:
        return f"the request is too large; at most {self._rules.max_body} bytes are read."


def _name_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _holds(authorization: str, key: str) -> bool:
    """Whether a header holds the key, in a time that says nothing of the key."""
    scheme, _, value = authorization.partition(" ")
    given = value.strip()
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            given = ""
    return secrets.compare_digest(given.encode(errors="replace"), key.encode())


async def _refuse(send: Send, path: str, status: int, message: str) -> None:
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        scheme = b"Basic" if path.startswith(A1111_PREFIX) else b"Bearer"
        headers.append((b"www-authenticate", scheme + b' realm="twostep"'))
    body = json.dumps(refusal(path, status, message)).encode()
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
