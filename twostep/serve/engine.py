"""Jobs: requests that wait, are drawn, and end in exactly one way.

An `Engine` has one thread for each device. A thread takes the next job of the client whose turn it
is, adds waiting jobs that may share its batch, and draws them without waiting for more; what comes
meanwhile is taken when that batch is done. Sharing changes no pixel (`pipeline.batching`).
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from twostep.errors import TwostepError
from twostep.pipeline.generation import OnAnswerOf, OnStepOf, Progress
from twostep.pipeline.request import MAX_BATCH, Request, Result
from twostep.serve.items import num_values
from twostep.serve.shapes import JobState

MAX_KEPT_JOBS = 1000
MAX_KEPT_PIXELS = 2**26
"""How many ended jobs, and pixels of their pictures, can still be asked for. What went in counts
like what came out: a large picture is kept as long as its job.
"""

_TURN = 0.2
"""Weight of the newest batch in the mean time that a job takes."""

_log = logging.getLogger(__name__)


class EngineError(TwostepError):
    """A job that was not drawn for a reason that is not in its request."""


class QueueFullError(EngineError):
    """As many jobs wait as may. `retry_after` is how many whole seconds they may take."""

    def __init__(self, num_waiting: int, retry_after: int) -> None:
        super().__init__(
            f"{num_waiting} jobs wait already, which is all that may; ask again in {retry_after} s."
        )
        self.retry_after = retry_after


class ClosingError(EngineError):
    """The engine shuts down: it takes no new jobs, or could not finish one."""


class LateError(EngineError):
    """A job was not done by its deadline."""


class CancelledError(EngineError):
    """A job was given up by its client."""


@runtime_checkable
class Draws(Protocol):
    """What draws several requests, as `pipeline.studio.Studio` does."""

    def submit(
        self,
        requests: Sequence[Request],
        *,
        on_step: OnStepOf | None = None,
        on_answer: OnAnswerOf | None = None,
    ) -> list[Result | TwostepError]:
        """Return one result or error for each request, and tell `on_answer` of it when it is there.

        What either function raises ends all.
        """


@runtime_checkable
class Observer(Protocol):
    """What is told of the work of an engine, by the threads that do it; must raise nothing."""

    def started(self, jobs: Sequence[Job]) -> None:
        """Jobs begin to be drawn, in one batch."""

    def ended(self, job: Job) -> None:
        """A job is done, failed or cancelled."""

    def refused(self) -> None:
        """A request found the queue full."""


@dataclass(frozen=True, eq=False)
class Event:
    """Something that happened to a job.

    - `kind`: "queued", "step", or the state in which the job ended.
    - `position`: of a job that was queued, how many were before it.
    - `num_done`, `num_steps`: steps taken of the whole job, and all of them.
    - `seeds`, `previews`: the pictures that took the step, as they are foreseen now. Previews are
      there only if the job wants them and has not ended.
    """

    kind: Literal["queued", "step", "done", "failed", "cancelled"]
    position: int = 0
    num_done: int = 0
    num_steps: int = 0
    seeds: tuple[int, ...] = ()
    previews: tuple[Image.Image, ...] = ()

    @property
    def is_end(self) -> bool:
        """Whether nothing follows."""
        return self.kind in ("done", "failed", "cancelled")


Listener = Callable[[Event], None]
"""Called with each event of a job, by the thread in which it happens; must return at once."""


def new_job_id() -> str:
    """Return a random name for a job, that nobody guesses."""
    return secrets.token_urlsafe(16)


class Job:
    """A request on its way. Made by `Engine.submit`.

    Attributes:
        id: a random name that nobody guesses.
        request: what is drawn.
        client: whose turn it takes.
        wants_previews: whether its steps bring previews.
        deadline: on the clock of `time.monotonic`, in seconds; None for none.
        likeness: equal for jobs that may share a batch.
    """

    def __init__(
        self,
        request: Request,
        client: str,
        *,
        id: str | None = None,
        wants_previews: bool,
        deadline: float | None,
    ) -> None:
        self.id = new_job_id() if id is None else id
        self.request = request
        self.client = client
        self.wants_previews = wants_previews
        self.deadline = deadline
        self.likeness = _likeness(request)
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._events: list[Event] = []
        self._listeners: list[Listener] = []
        self._state: JobState = "queued"
        self._result: Result | None = None
        self._error: TwostepError | None = None
        self._accepted = time.monotonic()
        self._started = math.nan

    @property
    def seconds_waited(self) -> float:
        """How long the job waited before it was drawn, once it is or was; nan before."""
        return self._started - self._accepted

    @property
    def state(self) -> JobState:
        """Where the job stands now."""
        return self._state

    @property
    def result(self) -> Result | None:
        """What was drawn, once the job is done."""
        return self._result

    @property
    def error(self) -> TwostepError | None:
        """Why the job failed or was cancelled."""
        return self._error

    @property
    def has_ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> Result:
        """Return the result when it is there.

        Raises the error that ended the job, and TimeoutError after `timeout` seconds.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"job {self.id} has not ended after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def follow(self, listener: Listener) -> None:
        """Call a listener with every event so far, and with those that follow."""
        with self._lock:
            for event in self._events:
                listener(event)
            self._listeners.append(listener)

    def unfollow(self, listener: Listener) -> None:
        """Call a listener no more."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def _start(self) -> bool:
        """Note that drawing begins; False if the job has ended."""
        with self._lock:
            if not self.has_ended:
                self._state = "drawing"
                self._started = time.monotonic()
            return not self.has_ended

    def _publish(self, event: Event) -> None:
        with self._lock:
            if self.has_ended:
                return
            self._events.append(event)
            for listener in list(self._listeners):
                listener(event)

    def _end(self, answer: Result | TwostepError) -> bool:
        """End the job, if nothing else has; says whether this did."""
        with self._lock:
            if self.has_ended:
                return False
            kind: Literal["done", "failed", "cancelled"] = "done"
            if isinstance(answer, TwostepError):
                kind = "cancelled" if isinstance(answer, CancelledError) else "failed"
                self._error = answer
            else:
                self._result = answer
            self._state = kind
            self._publish(Event(kind))
            self._events = [replace(event, previews=()) for event in self._events]
            self._ended.set()
            return True


class _NobodyWaits(Exception):
    """Every job of a batch has ended while it was drawn."""


class Engine:
    """Draws jobs, a batch at a time on each device.

    Args:
        studios: what draws, one for each device.
        max_waiting: how many jobs may wait, at least 1.
        observers: what is told of the work.

    All methods may be called by any thread.
    """

    def __init__(
        self,
        studios: Sequence[Draws],
        *,
        max_waiting: int = 64,
        observers: Sequence[Observer] = (),
    ) -> None:
        if not studios or max_waiting < 1:
            raise EngineError("an engine needs a device and a queue of at least 1.")
        self._max_waiting = max_waiting
        self._observers = tuple(observers)
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._jobs: dict[str, Job] = {}
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._num_ended_pixels = 0
        self._is_closing = False
        self._seconds_per_job = 0.0
        self._num_drawing = 0
        self._threads = [
            threading.Thread(target=self._work, args=[studio], name=f"draws-{i}", daemon=True)
            for i, studio in enumerate(studios)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """How many jobs wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def num_drawing(self) -> int:
        """How many jobs are drawn at the moment."""
        return self._num_drawing

    @property
    def is_alive(self) -> bool:
        """Whether new jobs are taken, and drawn on every device."""
        return not self._is_closing and self.has_all_threads

    @property
    def has_all_threads(self) -> bool:
        """Whether every device has its thread."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(
        self,
        request: Request,
        *,
        client: str = "",
        id: str | None = None,
        wants_previews: bool = False,
        seconds: float | None = None,
        even_if_full: bool = False,
        listener: Listener | None = None,
    ) -> Job:
        """Accept a request; from then on it is drawn or its end is reported.

        Args:
            request: what to draw.
            client: clients take turns, whatever each of them asks for.
            id: the name of the job, if it has one from before; else one is made.
            wants_previews: whether steps bring previews, which costs a little.
            seconds: after how many the job fails if it is not done.
            even_if_full: whether it may be one more than may wait, as it was accepted before.
            listener: follows the job from before anything happens to it. Who follows a job that was
                accepted already may find that it has ended, and its previews are gone.

        Raises:
            QueueFullError: as many jobs wait as may.
            ClosingError: the engine shuts down.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        job = Job(request, client, id=id, wants_previews=wants_previews, deadline=deadline)
        with self._changed:
            if self._is_closing:
                raise ClosingError("the server shuts down and takes no new jobs; ask it again.")
            position = self.num_waiting
            if position >= self._max_waiting and not even_if_full:
                for observer in self._observers:
                    observer.refused()
                raise QueueFullError(position, self._retry_after(position))
            self._jobs[job.id] = job
            self._waiting.setdefault(client, deque()).append(job)
            # Before any thread may take it, so that nothing is missed and this is its first event.
            if listener is not None:
                job.follow(listener)
            job._publish(Event("queued", position=position))
            self._changed.notify()
        return job

    def find(self, job_id: str) -> Job | None:
        """Return a job that waits, is drawn or ended not long ago."""
        with self._changed:
            return self._jobs.get(job_id) or self._ended.get(job_id)

    def cancel(self, job: Job) -> bool:
        """End a job now; False if it has ended already.

        A batch in which nobody waits any more stops before the next call of its network. One that
        others share goes on for them.
        """
        return self._end(job, CancelledError("the job was cancelled."))

    def close(self, seconds: float = 0.0) -> None:
        """Take no new jobs, finish the others, and return when every one has ended.

        What is not done after so many seconds fails with ClosingError, before the next call of its
        network.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._changed:
            left = list(self._jobs.values())
        for job in left:
            self._end(job, ClosingError("the server was shut down before the job was done."))
            _log.warning("job %s was not done at shutdown", job.id)
        for thread in self._threads:
            thread.join()

    def _retry_after(self, num_waiting: int) -> int:
        seconds = num_waiting * self._seconds_per_job / len(self._threads)
        return min(120, max(1, math.ceil(seconds)))

    def _work(self, studio: Draws) -> None:
        """Draw batch after batch, until the engine closes and nothing waits."""
        while jobs := self._take():
            start = time.monotonic()
            self._draw(studio, jobs)
            with self._changed:
                self._num_drawing -= len(jobs)
                mean = (time.monotonic() - start) / len(jobs)
                weight = _TURN if self._seconds_per_job else 1.0
                self._seconds_per_job += weight * (mean - self._seconds_per_job)

    def _take(self) -> list[Job]:
        """Wait for a job, and return it with those that may share its batch; none at the end."""
        with self._changed:
            while True:
                self._end_late()
                if self._waiting:
                    break
                if self._is_closing:
                    return []
                self._changed.wait()
            client = next(iter(self._waiting))
            jobs = [self._waiting[client][0]]
            self._remove(jobs[0])
            if client in self._waiting:
                self._waiting.move_to_end(client)
            room = MAX_BATCH - jobs[0].request.num_images
            while job := next(self._alike(jobs, room), None):
                self._remove(job)
                jobs.append(job)
                room -= job.request.num_images
            self._num_drawing += len(jobs)
            return jobs

    def _alike(self, jobs: Sequence[Job], room: int) -> Iterator[Job]:
        """Yield waiting jobs that fit into a batch, first those of clients with fewest in it."""
        taken = Counter(job.client for job in jobs)
        for client in sorted(self._waiting, key=taken.__getitem__):
            for job in self._waiting[client]:
                if job.request.num_images <= room and job.likeness == jobs[0].likeness:
                    yield job

    def _remove(self, job: Job) -> None:
        """Take a job out of the queue, if it is there."""
        queue = self._waiting.get(job.client)
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.client]

    def _draw(self, studio: Draws, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job._start()]
        if not jobs:
            return
        for observer in self._observers:
            observer.started(jobs)

        def on_step(place: int, progress: Progress) -> None:
            _report(jobs[place], progress)
            self._end_late()
            if all(job.has_ended for job in jobs):
                raise _NobodyWaits

        def on_answer(place: int, answer: Result | TwostepError) -> None:
            # Its client has it while the others are decoded, and may ask again before the next
            # batch begins.
            self._end(jobs[place], answer)
            if all(job.has_ended for job in jobs):
                raise _NobodyWaits

        try:
            requests = [job.request for job in jobs]
            answers = studio.submit(requests, on_step=on_step, on_answer=on_answer)
        except _NobodyWaits:
            return
        except Exception as error:
            # A fault of ours, or memory that ran out. It must end neither the thread nor jobs that
            # would be drawn without the one that has it.
            if len(jobs) > 1:
                for job in jobs:
                    self._draw(studio, [job])
                return
            _log.exception("job %s failed", jobs[0].id)
            reason = f"drawing failed ({type(error).__name__}); the server's log says more."
            self._end(jobs[0], EngineError(reason))
            return
        for job, answer in zip(jobs, answers, strict=True):
            self._end(job, answer)

    def _end(self, job: Job, answer: Result | TwostepError) -> bool:
        """End a job, and forget the oldest ends if there are too many."""
        with self._changed:
            if not job._end(answer):
                return False
            self._remove(job)
            del self._jobs[job.id]
            self._ended[job.id] = job
            self._num_ended_pixels += _num_pixels(job)
            self._forget()
        for observer in self._observers:
            observer.ended(job)
        return True

    def _end_late(self) -> None:
        """End the jobs whose deadline has passed."""
        with self._changed:
            now = time.monotonic()
            late = [
                job
                for job in self._jobs.values()
                if job.deadline is not None and job.deadline <= now
            ]
            for job in late:
                self._end(job, LateError("the job was not done by its deadline."))

    def _forget(self) -> None:
        """Let go of the oldest ended jobs while there are too many; the newest stays."""
        while len(self._ended) > 1 and (
            len(self._ended) > MAX_KEPT_JOBS or self._num_ended_pixels > MAX_KEPT_PIXELS
        ):
            _, oldest = self._ended.popitem(last=False)
            self._num_ended_pixels -= _num_pixels(oldest)


def _report(job: Job, progress: Progress) -> None:
    """Tell a job of a step."""
    wanted = job.wants_previews and not job.has_ended
    event = Event(
        "step",
        num_done=progress.num_done,
        num_steps=progress.num_steps,
        seeds=tuple(progress.seeds),
        previews=tuple(progress.previews()) if wanted else (),
    )
    job._publish(event)


def _likeness(request: Request) -> object:
    """What requests that may share a batch have in common, as far as that is known beforehand."""
    return replace(
        request,
        prompt="",
        negative_prompt="",
        num_images=1,
        seed=0,
        image=None,
        strength=None,
        mask=None,
        controls=(),
    ), (
        request.strength,
        request.image is None,
        request.mask is None,
        tuple((each.model, each.scale, each.start, each.end) for each in request.controls),
    )


def _num_pixels(job: Job) -> int:
    """Return the pixels, and samples, of all that a job keeps in memory."""
    request = job.request
    pictures = [request.image, request.mask, *(control.picture for control in request.controls)]
    went_in = [picture.image for picture in pictures if picture is not None]
    came_out = [] if job.result is None else job.result.images
    return sum(map(num_values, (*went_in, *came_out)))
