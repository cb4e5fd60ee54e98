"""Clients that come and go leave nothing behind."""

import asyncio
import gc
import json
from typing import Any

import pytest

from tests.serve.conftest import APPLE, FakeStudio, posting
from twostep.pipeline.request import MAX_BATCH
from twostep.serve import a1111_routes
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import MAX_KEPT_JOBS, Engine
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving

PATHS = ("/v1/images/generations", "/sdapi/v1/txt2img")


def living() -> tuple[int, int]:
    """Return how many jobs and desks are in memory, those of other tests too."""
    gc.collect()
    kinds = [type(thing).__name__ for thing in gc.get_objects()]
    return kinds.count("Job"), kinds.count("_Desk")


@pytest.mark.slow
def test_a_thousand_clients_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a1111_routes, "MAX_CLIENTS", 100)
    before = living()
    fake = FakeStudio()
    engine = Engine([fake], max_waiting=8)
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules())
    body = json.dumps({"prompt": APPLE, "stream": True}).encode()

    async def visit(number: int) -> None:
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        scope = posting(PATHS[number % 2], f"client {number}")
        await application(scope, receive, send)

    async def visits() -> None:
        for start in range(0, 1200, 4):
            await asyncio.gather(*(visit(number) for number in range(start, start + 4)))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(visits())
    assert engine.num_waiting == 0
    assert {job.state for job in engine._ended.values()} == {"cancelled"}
    assert not any(job._listeners for job in engine._ended.values())
    assert not engine._jobs
    assert len(engine._ended) == MAX_KEPT_JOBS
    new_jobs, new_desks = (now - then for now, then in zip(living(), before, strict=True))
    assert new_jobs <= MAX_KEPT_JOBS + MAX_BATCH  # and the batch that is held up
    assert new_desks <= 101
    fake.steps.release(10**6)
    engine.close(10.0)
