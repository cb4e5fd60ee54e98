"""The same engine on many machines: replicas in Ray Serve, and jobs that are drawn by them.

The server stays one process, with its APIs, queue, turns and job store. What draws for its engine
is a `RemoteStudio`, which gives jobs to replicas. A replica is an engine of its own, with a studio:
jobs that are alike and wait there share a batch. Ray sends a job to a replica that has its model
and student at hand, where there is one with room, and adds and takes away replicas as jobs come.
Where a replica dies, its jobs are drawn by another; the same seed gives the same picture.

Needs the extra `cluster`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from twostep.errors import TwostepError
from twostep.pipeline.generation import OnAnswerOf, OnStepOf, Progress
from twostep.pipeline.request import MAX_BATCH, Request, Result
from twostep.serve.config import ClusterSettings, ServeSettings
from twostep.serve.engine import ClosingError, Engine, EngineError, Event, Job

APP = "twostep"
"""What the replicas are called in Ray Serve."""

_ATTEMPTS = 6
"""How often a job is given to a replica before it fails: a few may die, one after the other."""

_FIRST_PAUSE = 0.5
"""Seconds before the second attempt; each later pause is twice as long."""

_MAX_CALLS = 256
"""The most jobs that are with replicas at once; a thread waits for each."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A job as a replica is given it."""

    request: Request
    client: str
    wants_previews: bool


Sent = tuple[int, Event | Result | TwostepError]
"""What a replica sends: the place of a call, and a step of it or its end."""


class Drawer:
    """A replica: an engine with one studio, which Ray calls.

    Args:
        settings: those of the server; paths must lead to the same files on every machine.
    """

    def __init__(self, settings: ServeSettings) -> None:
        # The front needs none of it, and Ray pickles this class by its name.
        from twostep.serve.logs import JobLog, set_up_logs
        from twostep.serve.start import make_studio, make_watch

        prompts = settings.log_prompts
        log = JobLog(with_prompts=prompts)
        set_up_logs(settings.log_format, settings.log_level, log, with_prompts=prompts)
        watch = make_watch(settings)
        model = watch.stock().default.model
        studio, draws = make_studio(settings.devices[0], settings, watch, model)
        assert settings.cluster is not None
        most = settings.cluster.jobs_per_replica * MAX_BATCH
        self._engine = Engine([draws], max_waiting=most, observers=[log])
        if settings.reload_seconds:
            from twostep.serve.catalogue import Catalogue
            from twostep.serve.reloading import Reloader

            Reloader(watch, Catalogue(watch.stock()), [studio], settings.reload_seconds)

    @serve.multiplexed(max_num_models_per_replica=8)  # type: ignore[untyped-decorator]
    async def _at_hand(self, key: str) -> str:
        """Let Ray note which models and students are at hand; the studio loads and keeps them."""
        return key

    async def draw(self, calls: Sequence[Call]) -> AsyncIterator[Sent]:
        """Queue jobs, and yield what happens to each until all have ended.

        They are cancelled where nobody listens any more.
        """
        await self._at_hand(serve.get_multiplexed_model_id())
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def listen(place: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended with the replica
                loop.call_soon_threadsafe(queue.put_nowait, (place, event))

        jobs: list[Job] = []
        try:
            for place, call in enumerate(calls):
                job = self._engine.submit(
                    call.request,
                    client=call.client,
                    wants_previews=call.wants_previews,
                    listener=partial(listen, place),
                )
                jobs.append(job)
            num_left = len(jobs)
            while num_left:
                place, event = await queue.get()
                if event.kind == "step":
                    yield place, event
                elif event.is_end:
                    num_left -= 1
                    end = jobs[place].result or jobs[place].error
                    assert end is not None
                    yield place, end
        finally:
            for job in jobs:
                self._engine.cancel(job)

    def check_health(self) -> None:
        """Raise where the replica can draw no more, so that Ray makes another."""
        if not self._engine.has_all_threads:
            raise EngineError("the thread that draws has ended.")


def _progress_of(event: Event) -> Progress:
    """Return a step that was taken by a replica.

    Its previews are those that came with it; none if the job did not want them at its start.
    """
    previews = list(event.previews)
    return Progress(event.num_done, event.num_steps, list(event.seeds), lambda: previews)


class RemoteStudio:
    """Draws with replicas. It is what an engine draws with, and an observer of that engine too.

    As an observer it learns of the jobs behind the requests that it is then given by the same
    thread: whose turn they take, and whether they want previews.

    Args:
        handle: of the replicas.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(stream=True)
        self._mine = threading.local()

    def started(self, jobs: Sequence[Job]) -> None:
        """Remember the jobs that this thread draws next."""
        self._mine.jobs = tuple(jobs)

    def ended(self, job: Job) -> None:
        """Take no note of an end."""

    def refused(self) -> None:
        """Take no note of what was not accepted."""

    def submit(
        self,
        requests: Sequence[Request],
        *,
        on_step: OnStepOf | None = None,
        on_answer: OnAnswerOf | None = None,
    ) -> list[Result | TwostepError]:
        """Draw requests as `Studio.submit` does; what a dead replica had is drawn by another.

        Raises EngineError where no replica could draw them.
        """
        calls = [Call(job.request, job.client, job.wants_previews) for job in self._mine.jobs]
        assert [call.request for call in calls] == list(requests)
        ends: dict[int, Result | TwostepError] = {}
        pause = _FIRST_PAUSE
        for attempt in range(_ATTEMPTS):
            left = [place for place in range(len(calls)) if place not in ends]
            try:
                for index, sent in self._sent([calls[place] for place in left]):
                    if isinstance(sent, Event):
                        if on_step is not None:
                            on_step(left[index], _progress_of(sent))
                    elif not isinstance(sent, ClosingError):
                        ends[left[index]] = sent
                        if on_answer is not None:
                            on_answer(left[index], sent)
            except RayTaskError:
                raise  # a fault of ours, which another replica has too
            except (RayError, RayServeException) as error:
                _log.warning("a replica was lost: %s", type(error).__name__)
            if len(ends) == len(calls):
                return [ends[place] for place in range(len(calls))]
            if attempt + 1 < _ATTEMPTS:
                time.sleep(pause)
                pause *= 2
        raise EngineError("no replica could draw it; see what Ray says of them.")

    def _sent(self, calls: list[Call]) -> Iterator[Sent]:
        """Yield what the replica sends that Ray picks; it stops drawing where this is left."""
        request = calls[0].request
        handle = self._handle.options(multiplexed_model_id=f"{request.model}|{request.steps}")
        stream = handle.draw.remote(calls)
        try:
            yield from stream
        finally:
            stream.cancel()


class Cluster:
    """The replicas in Ray, started with the object and ended by `close`.

    Args:
        settings: those of the server, with `cluster`.
    """

    def __init__(self, settings: ServeSettings) -> None:
        cluster = settings.cluster
        assert cluster is not None
        self._is_own = cluster.address is None
        with _own_way_to_end():
            ray.init(
                address=cluster.address,
                include_dashboard=False if self._is_own else None,
                log_to_driver=False,
            )
        # The server answers HTTP itself.
        serve.start(http_options={"location": "NoServer"})
        app = _deployment(settings, cluster).bind(settings)
        self.studio = RemoteStudio(serve.run(app, name=APP, route_prefix=None))
        self.num_calls = min(cluster.max_replicas * cluster.jobs_per_replica, _MAX_CALLS)

    def close(self) -> None:
        """End the replicas, and Ray if it was started here."""
        serve.delete(APP)
        if self._is_own:
            ray.shutdown()


@contextlib.contextmanager
def _own_way_to_end() -> Iterator[None]:
    """Keep what SIGTERM does: Ray would have the process end with 15, as if it had failed."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _deployment(settings: ServeSettings, cluster: ClusterSettings) -> Any:
    """Return how Ray is to run replicas."""
    return serve.deployment(
        name="drawer",
        max_ongoing_requests=cluster.jobs_per_replica,
        autoscaling_config={
            "min_replicas": cluster.min_replicas,
            "initial_replicas": cluster.min_replicas,
            "max_replicas": cluster.max_replicas,
            "target_ongoing_requests": max(1.0, cluster.jobs_per_replica / 2),
            "upscale_delay_s": cluster.upscale_seconds,
            "downscale_delay_s": cluster.downscale_seconds,
        },
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_period_s=2.0,
    )(Drawer)
