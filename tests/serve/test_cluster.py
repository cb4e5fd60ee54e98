"""Replicas in Ray: the same pictures, and no job is lost with the replica that had it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import APPLE
from twostep.pipeline.request import Request, Result
from twostep.pipeline.studio import Studio
from twostep.serve.config import ClusterSettings, ServeSettings
from twostep.serve.engine import CancelledError, Engine, Event

pytest.importorskip("ray", reason="Ray is not installed: pip install 'twostep[cluster]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two replicas that draw with nano."""
    from twostep.serve.cluster import Cluster

    settings = ServeSettings(
        models=("nano",),
        cluster=ClusterSettings(min_replicas=2, max_replicas=2, cpus=0.5, jobs_per_replica=4),
        reload_seconds=0,
    )
    cluster = Cluster(settings)
    yield cluster
    cluster.close()


@pytest.fixture
def engine(cluster: Any) -> Iterator[Engine]:
    engine = Engine([cluster.studio] * cluster.num_calls, observers=[cluster.studio])
    yield engine
    engine.close(0.0)


def replicas() -> list[Any]:
    """The actors that draw, as Ray knows them."""
    import ray
    from ray.util import list_named_actors

    return [
        ray.get_actor(each["name"], namespace=each["namespace"])
        for each in list_named_actors(all_namespaces=True)
        if each["name"].startswith("SERVE_REPLICA::")
    ]


def pixels(result: Result) -> list[bytes]:
    return [image.tobytes() for image in result.images]


def test_replicas_draw_what_a_studio_draws_and_tell_of_steps(engine: Engine) -> None:
    request = Request(APPLE, steps=4, seed=7, num_images=2)
    events: list[Event] = []
    job = engine.submit(request, wants_previews=True)
    job.follow(events.append)
    assert pixels(job.wait(300.0)) == pixels(Studio("cpu").draw(request))
    kinds = [event.kind for event in events]
    assert kinds == ["queued", *["step"] * 4, "done"]
    assert [event.num_done for event in events[1:-1]] == [1, 2, 3, 4]
    bad = engine.submit(Request(APPLE, steps=77))
    with pytest.raises(Exception, match="77"):
        bad.wait(300.0)


def test_a_replica_is_free_soon_after_its_jobs_are_cancelled(engine: Engine) -> None:
    started = threading.Event()
    long = Request("long", model="nano", steps=32, guidance=5.0, num_images=16)
    jobs = [engine.submit(long, client=str(i)) for i in range(4)]
    for job in jobs:
        job.follow(lambda event: started.set() if event.kind == "step" else None)
    assert started.wait(300)
    for job in jobs:
        engine.cancel(job)
    start = time.monotonic()
    engine.submit(Request(APPLE, steps=1)).wait(300.0)
    # Four times sixteen pictures of 32 guided steps would have taken minutes.
    assert time.monotonic() - start < 60
    with pytest.raises(CancelledError):
        jobs[0].wait(0.0)


def test_killing_a_replica_under_load_loses_no_job(engine: Engine) -> None:
    import ray

    steps = threading.Semaphore(0)
    request = Request(APPLE, steps=32, guidance=5.0, seed=5)
    jobs = [engine.submit(request, client=str(i)) for i in range(12)]
    for job in jobs:
        job.follow(lambda event: steps.release() if event.kind == "step" else None)
    for _ in range(6):
        assert steps.acquire(timeout=300)
    (first, second) = replicas()
    ray.kill(first, no_restart=True)
    results = [job.wait(600.0) for job in jobs]
    expected = pixels(Studio("cpu").draw(request))
    assert [pixels(result) for result in results] == [expected] * 12
    # Ray puts another in its place.
    end = time.monotonic() + 120
    while len(replicas()) < 2:
        assert time.monotonic() < end
        time.sleep(0.5)
    assert first not in replicas()
    assert second in replicas()


def test_the_verb_starts_a_cluster_from_its_settings(tmp_path: Path) -> None:
    import os
    import re
    import signal
    import subprocess
    import sys

    import twostep

    path = tmp_path / "serve.toml"
    path.write_text("port = 0\n[cluster]\nmin_replicas = 1\nmax_replicas = 1\ncpus = 0.1\n")
    command = [sys.executable, "-m", "twostep", "serve", "--config", str(path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            found = next(
                match for line in server.stdout if (match := re.search(r"http://\S+:\d+", line))
            )
            with twostep.Client(found[0]) as client:
                drawn = client.draw(twostep.Request(APPLE, steps=2, seed=7))
            assert len(drawn.files) == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(120) in (0, -signal.SIGTERM)
        finally:
            server.kill()
