"""What those ask who run a server: /healthz, /readyz and /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from twostep.serve.document import Responses, refusals
from twostep.serve.serving import Serving


def operation_routes(serving: Serving) -> APIRouter:
    """Return the addresses; /metrics is there if the server has metrics."""
    router = APIRouter(tags=["operation"], responses=refusals())
    engine = serving.engine

    unwell: Responses = {503: {"description": "It is not so."}}

    @router.get("/healthz", responses=unwell)
    def health() -> JSONResponse:
        """Say whether every device still has its thread; 503 means that a restart is due."""
        return _answer(engine.has_all_threads, {"status": "ok"})

    @router.get("/readyz", responses=unwell)
    def readiness() -> JSONResponse:
        """Say whether jobs are taken; a picture was drawn before the server began to listen."""
        state = {"waiting": engine.num_waiting, "drawing": engine.num_drawing}
        return _answer(engine.is_alive, {"status": "ok", **state})

    metrics = serving.metrics
    if metrics is not None:

        @router.get(
            "/metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}},
        )
        def figures() -> Response:
            """Return the figures for Prometheus."""
            return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _answer(is_well: bool, values: dict[str, Any]) -> JSONResponse:
    if is_well:
        return JSONResponse(values)
    return JSONResponse(values | {"status": "unavailable"}, status_code=503)
