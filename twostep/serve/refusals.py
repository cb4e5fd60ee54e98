"""Errors as clients of each API expect them."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from twostep.errors import TwostepError

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request under way; empty where there is none."""

A1111_PREFIX = ("/sdapi/", "/controlnet/")
"""How the addresses of A1111's API begin, and those of its extension for ControlNets; all others
have the OpenAI API's shape of errors.
"""


def code_of(error: TwostepError | None) -> str | None:
    """Return the word for programs that an error has, None for most."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) else None


def refusal(
    path: str, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the body of an answer that refuses, as plain values for JSON.

    Args:
        path: the address that was asked.
        status: the HTTP status.
        message: one sentence.
        code: a word for programs, where there is one.
        param: the field that is at fault, where it is one.
    """
    message = _writable(message)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    request_id = REQUEST_ID.get()
    traced = {"request_id": request_id} if request_id else {}
    if path.startswith(A1111_PREFIX):
        return {"error": code or kind, "detail": message, "body": "", "errors": message, **traced}
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param and _writable(param),
            "code": code,
        },
        **traced,
    }


def _writable(text: str) -> str:
    """Return a text that may quote a client with what UTF-8 has no place for written as escapes."""
    return text.encode(errors="backslashreplace").decode()
