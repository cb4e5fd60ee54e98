"""The live page at /: plain files, no build, nothing from other hosts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_SCRIPTS = ("canvas", "controls", "copies", "page", "player", "png", "riff", "server", "turns")

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in _SCRIPTS},
}
"""The files of the page and their types, by address. They hold nothing that a key protects."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """Return the addresses of the page."""
    router = APIRouter(include_in_schema=False)
    folder = files("twostep.serve") / "page"
    for address, (name, kind) in PAGE_FILES.items():
        data = (folder / name).read_bytes()
        router.add_api_route(address, _sender(data, kind), methods=["GET"], name=name)
    return router


def _sender(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    """Return what sends one file."""

    async def send() -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)

    return send
