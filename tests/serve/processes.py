"""`twostep serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server on a free port, and yield it with its address; it is killed in the end."""
    command = [sys.executable, "-m", "twostep", "serve", "--port", "0", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        found = None
        for line in server.stdout:
            if found := re.search(r"http://[\w.]+:\d+", line):
                break
        assert found is not None, "the server did not start"
        try:
            yield server, found[0]
        finally:
            server.kill()
