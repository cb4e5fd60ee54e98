"""Studios that tests can hold up, an engine, and a server within the process and on a port."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from tests.clips import save_clip_model
from tests.sounds import save_sound_model
from twostep.pipeline.generation import Progress
from twostep.pipeline.request import RequestError
from twostep.pipeline.studio import Studio
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Draws, Engine
from twostep.serve.gate import Rules
from twostep.serve.logs import JobLog
from twostep.serve.metrics import Metrics
from twostep.serve.serving import Serving

APPLE = "a 3d red apple on a blue background"


class FakeStudio:
    """Draws a step when it is told to, and notes what it was given."""

    def __init__(self, num_steps: int = 1) -> None:
        self.num_steps = num_steps
        self.drawn: list[list[str]] = []
        self.steps = threading.Semaphore(0)
        self.busy = threading.Semaphore(0)
        self.num_calls = 0

    def submit(self, requests: Any, *, on_step: Any = None, on_answer: Any = None) -> list[Any]:
        self.drawn.append([request.prompt for request in requests])
        self.busy.release()
        for i in range(self.num_steps):
            assert self.steps.acquire(timeout=10)
            self.num_calls += 1
            if any("broken" in request.prompt for request in requests):
                raise ZeroDivisionError("a fault")
            for place in range(len(requests)):
                on_step(place, step_taken(i + 1, self.num_steps, [Image.new("RGB", (8, 8))]))
        answers = [RequestError(f"drawn {request.prompt}") for request in requests]
        if on_answer is not None:
            for place, answer in enumerate(answers):
                on_answer(place, answer)
        return answers


def step_taken(num_done: int, num_steps: int, previews: list[Image.Image]) -> Progress:
    """Return a step with such previews."""
    return Progress(num_done, num_steps, list(range(len(previews))), lambda: previews)


@pytest.fixture
def fake() -> FakeStudio:
    return FakeStudio()


@pytest.fixture
def engine(fake: FakeStudio) -> Iterator[Engine]:
    engine = Engine([fake], max_waiting=8)
    yield engine
    fake.steps.release(1000)
    engine.close(10.0)


class GatedStudio(Studio):
    """A studio that waits at a gate, and notes how many requests it was given at once."""

    def __init__(self) -> None:
        super().__init__("cpu", max_models=8)
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.sizes: list[int] = []

    def submit(self, requests: Any, *, on_step: Any = None, on_answer: Any = None) -> list[Any]:
        self.sizes.append(len(requests))
        self.arrived.release()
        assert self.gate.wait(30)
        return super().submit(requests, on_step=on_step, on_answer=on_answer)


@pytest.fixture(scope="session")
def studio() -> GatedStudio:
    return GatedStudio()


@pytest.fixture(scope="session")
def client(studio: GatedStudio) -> Iterator[TestClient]:
    serving = Serving(Engine([studio]), Catalogue(["nano"]))
    with TestClient(create_app(serving, Rules()), base_url="http://127.0.0.1") as client:
        yield client


@contextmanager
def listening(
    studio: Draws,
    *,
    with_mcp: bool = False,
    max_waiting: int = 64,
    handover_token: str | None = None,
    rules: Rules | None = None,
    log: JobLog | None = None,
    models: Sequence[str] = ("nano",),
) -> Iterator[str]:
    """Serve models on a free port, and yield the address."""
    metrics = Metrics()
    observers = [metrics] if log is None else [metrics, log]
    engine = Engine([studio], max_waiting=max_waiting, observers=observers)
    metrics.watch(engine)
    serving = Serving(engine, Catalogue(models), metrics=metrics, log=log)
    application = create_app(
        serving, rules or Rules(), with_mcp=with_mcp, handover_token=handover_token
    )
    config = uvicorn.Config(application, port=0, log_level="warning", http="h11")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def media_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model of each medium: nano, "clips" and "sounds", the last two of random weights."""
    folder = tmp_path_factory.mktemp("media")
    clips = save_clip_model(folder / "clips")
    sounds = save_sound_model(folder / "sounds")
    return ["nano", str(clips), str(sounds)]


@pytest.fixture(scope="session")
def address(studio: GatedStudio) -> Iterator[str]:
    """The address of a server that draws with nano."""
    with listening(studio) as found:
        yield found


def posting(path: str, client: str | None = None) -> dict[str, Any]:
    """An ASGI scope: JSON is posted to an address, by a client that says its name or does not."""
    named = [] if client is None else [(b"x-twostep-client", client.encode())]
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1"), *named],
    }
