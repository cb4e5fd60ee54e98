"""`twostep serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

_PRELOADED = ("twostep.cli.serve", "twostep.serve.app", "twostep.pipeline.studio")
"""What takes seconds to import: once, by the process that all servers are forks of."""

_context = get_context("forkserver")
_context.set_forkserver_preload(list(_PRELOADED))


class Running:
    """A server that runs, and its address."""

    def __init__(self, process: ForkServerProcess, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process.is_alive()

    def kill(self) -> None:
        """End it at once, by SIGKILL, and wait until it has ended."""
        self._process.kill()
        self._process.join()
        assert self._process.exitcode == -signal.SIGKILL


@contextmanager
def running(*arguments: str, kept_jobs: int | None = None) -> Iterator[Running]:
    """Run a server on a free port; it is killed in the end.

    `kept_jobs` is how many ended jobs it keeps, if not as many as usual.
    """
    reader, writer = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(writer, arguments, kept_jobs))
    process.start()
    writer.close()
    try:
        yield Running(process, _address(reader))
    finally:
        process.kill()
        process.join()


def _serve(writer: Connection, arguments: Sequence[str], kept_jobs: int | None) -> None:
    """Be the command, whose output goes to the writer."""
    os.dup2(writer.fileno(), 1)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    from twostep.cli import app
    from twostep.serve import engine

    if kept_jobs is not None:
        engine.MAX_KEPT_JOBS = kept_jobs
    app(["serve", "--port", "0", *arguments])


def _address(reader: Connection) -> str:
    """Return the address that a server says."""
    text = b""
    while (found := re.search(rb"http://[\w.]+:\d+", text)) is None:
        more = os.read(reader.fileno(), 4096)
        assert more, f"the server did not start: {text!r}"
        text += more
    # What it says later must not fill the pipe.
    threading.Thread(target=_drain, args=[reader], daemon=True).start()
    return found[0].decode()


def _drain(reader: Connection) -> None:
    while os.read(reader.fileno(), 4096):
        pass
