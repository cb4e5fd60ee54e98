"""A server that is killed again and again while clients ask it; what it accepted ends once."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import twostep
from tests.serve.conftest import APPLE
from tests.serve.processes import Running, running
from twostep.serve.client import ServerError

NUM_CLIENTS = 4
NUM_SEEDS = 8
LEAST_OF_A_ROUND = 3
"""Jobs that are accepted at least before a kill."""


@dataclass(frozen=True)
class Accepted:
    """A job that the server said it took."""

    id: str
    request: twostep.Request


def under_fire(path: Path, kills: int, seed: int) -> list[Accepted]:
    """Kill a server so often, while clients post jobs to it, and check what came of all of them.

    Jobs are those of one, two and eight steps, so that some are done before the kill, some are
    drawn, and others wait. Returns what was accepted; raises AssertionError where a job is lost,
    ended twice, or drawn otherwise than it is without kills.
    """
    dice = random.Random(seed)
    accepted: list[Accepted] = []
    for _ in range(kills):
        with running("--jobs", str(path)) as server:
            _ask_until_killed(server, accepted, dice)
    with running("--jobs", str(path)) as server, twostep.Client(server.address) as client:
        drawn: dict[twostep.Request, list[bytes]] = {}
        for job in accepted:
            files = client.job(job.id).wait().files
            assert len(files) == 1, job
            assert drawn.setdefault(job.request, files) == files, job
        for request, files in drawn.items():
            assert client.draw(request).files == files, request
    _check_rows(path, {job.id for job in accepted})
    return accepted


def _ask_until_killed(server: Running, accepted: list[Accepted], dice: random.Random) -> None:
    """Let clients post jobs, and kill the server at a random moment after the first are taken."""
    least = len(accepted) + LEAST_OF_A_ROUND
    delay = dice.uniform(0.0, 1.5)
    is_killed = threading.Event()
    seeds = [dice.randrange(2**30) for _ in range(NUM_CLIENTS)]

    def ask(number: int) -> None:
        own = random.Random(seeds[number])
        with twostep.Client(server.address, name=f"client {number}", patience=0.0) as client:
            while not is_killed.is_set():
                seed, steps = own.randrange(NUM_SEEDS), own.choice([1, 2, 8])
                request = twostep.Request(APPLE, seed=seed, steps=steps)
                # Where the queue is full, or the server was killed, nothing was accepted.
                with contextlib.suppress(ServerError):
                    accepted.append(Accepted(client.submit(request).id, request))
                time.sleep(own.uniform(0.0, 0.4))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 300
    while len(accepted) < least:
        assert time.monotonic() < end, "the server takes no jobs"
        time.sleep(0.01)
    time.sleep(delay)
    server.kill()
    is_killed.set()
    for thread in threads:
        thread.join()


def _check_rows(path: Path, ids: set[str]) -> None:
    """Check that the file has one end and one picture of every job, and nothing unfinished."""
    rows = sqlite3.connect(path)
    ends = dict(rows.execute("SELECT id, count(answer) FROM jobs GROUP BY id").fetchall())
    pictures = dict(rows.execute("SELECT id, count(*) FROM images GROUP BY id").fetchall())
    rows.close()
    assert set(ends.values()) == {1}
    assert ids <= set(ends)
    assert all(pictures[each] == 1 for each in ids)
