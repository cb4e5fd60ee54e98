"""What benchmarks of servers share: a server in a process, and clients that ask all the time."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import psutil

from twostep.pipeline.request import Request

COLOURS = ("red", "blue", "green", "yellow")
THINGS = ("apple", "dog", "cat", "car", "tree", "house", "fish", "star")


def stop(message: str) -> NoReturn:
    """End with a message."""
    print(message, file=sys.stderr)
    raise SystemExit(1)


@dataclass(frozen=True)
class Wish:
    """One picture that a client asks for."""

    prompt: str
    seed: int

    def request(self, model: str, steps: int) -> Request:
        """Return the same for the pipeline."""
        return Request(self.prompt, seed=self.seed, steps=steps, model=model)


def wish(number: int) -> Wish:
    """Return the wish of a number: neighbours differ in their words, and all in their seeds."""
    colour = COLOURS[number % len(COLOURS)]
    thing = THINGS[number % len(THINGS)]
    return Wish(f"a 3d {colour} {thing} on a white background", number)


@dataclass
class Served:
    """A server that runs, its address, and what it uses of the processor."""

    host: str
    port: int
    process: subprocess.Popen[str]

    @property
    def address(self) -> str:
        """The address as clients name it."""
        return f"http://{self.host}:{self.port}"

    def processor_seconds(self) -> float:
        """Return the processor time that the server has used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection."""
        return http.client.HTTPConnection(self.host, self.port, timeout=120)


@contextmanager
def serve(command: Sequence[str]) -> Iterator[Served]:
    """Run a server that prints its address, and end it afterwards."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _found(process)
    finally:
        process.terminate()
        process.wait(60)


def _found(process: subprocess.Popen[str]) -> Served:
    """Wait until a server prints its address."""
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"http://([\w.]+):(\d+)", line):
            # What it prints later must not fill the pipe.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return Served(match[1], int(match[2]), process)
    stop("the server did not start.")


@dataclass
class Answers:
    """What one client got: the seconds of each answer, and the last file with its wish."""

    seconds: list[float] = field(default_factory=list)
    last: tuple[Wish, bytes] | None = None


Ask = Callable[[http.client.HTTPConnection, str, Wish], bytes]
"""Asks over a connection, as a client of some name, and returns the file of the picture."""


def ask_openai(steps: int, model: str) -> Ask:
    """Return what asks OpenAI's images API."""

    def ask(connection: http.client.HTTPConnection, client: str, one: Wish) -> bytes:
        body = {"prompt": one.prompt, "seed": one.seed, "steps": steps, "model": model}
        headers = {"Content-Type": "application/json", "X-Twostep-Client": client}
        answer = posted(connection, "/v1/images/generations", body, headers)
        return base64.b64decode(answer["data"][0]["b64_json"])

    return ask


def posted(
    connection: http.client.HTTPConnection, path: str, body: object, headers: dict[str, str]
) -> Any:
    """Post JSON and return what is answered; stops at anything but success."""
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    data = response.read()
    if response.status not in (200, 202):
        stop(f"{path} answered {response.status}: {data[:300]!r}")
    return json.loads(data)


def load(
    served: Served, ask: Ask, *, clients: int, seconds: float, warm: float
) -> tuple[list[Answers], float]:
    """Let clients ask one after the other without a pause, and return what was answered in time.

    Each client has a connection and a thread. Answers of the first `warm` seconds, and those that
    come after `seconds` more, are not counted. Also returns the server's processor seconds of the
    time that is counted.
    """
    answers = [Answers() for _ in range(clients)]
    start = time.perf_counter() + warm
    end = start + seconds

    def work(place: int) -> None:
        connection = served.connect()
        number = place
        while (asked := time.perf_counter()) < end:
            one = wish(number)
            data = ask(connection, f"client {place}", one)
            now = time.perf_counter()
            if start <= now < end:
                answers[place].seconds.append(now - asked)
                answers[place].last = (one, data)
            number += clients
        connection.close()

    threads = [threading.Thread(target=work, args=[place]) for place in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(max(0.0, start - time.perf_counter()))
    used = served.processor_seconds()
    time.sleep(max(0.0, end - time.perf_counter()))
    used = served.processor_seconds() - used
    for thread in threads:
        thread.join()
    if not all(each.seconds for each in answers):
        stop("a client got no answer in time; give more --seconds.")
    return answers, used


def figures(answers: list[Answers], seconds: float) -> dict[str, float]:
    """Return pictures a second, and how long answers took in milliseconds."""
    latencies = [1e3 * each for one in answers for each in one.seconds]
    counts = [len(one.seconds) for one in answers]
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "pictures_per_second": sum(counts) / seconds,
        "p50_ms": cuts[49],
        "p95_ms": cuts[94],
        "fewest_of_a_client": min(counts),
        "most_of_a_client": max(counts),
    }
