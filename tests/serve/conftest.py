"""A server on a port of this machine, as clients of others need it."""

import threading
from collections.abc import Iterator

import pytest
import uvicorn

from twostep.pipeline.studio import Studio
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server that draws with nano."""
    serving = Serving(Engine([Studio("cpu", max_models=4)]), Catalogue(["nano"]))
    config = uvicorn.Config(create_app(serving, Rules()), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
