"""The log: one line for each thing, as text or as JSON, without prompts unless it may have them.

Modules log through the standard library, with what a line is about as `extra`. Here it gets its
form, the id of the request and, in a batch, the jobs.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

from twostep.serve.engine import EngineError, Job
from twostep.serve.following import milliseconds
from twostep.serve.refusals import REQUEST_ID

_HIDDEN = "[prompt]"
"""What stands in a log where a prompt stood."""

_log = logging.getLogger(__name__)


class JobLog:
    """Logs how jobs begin and end; an observer of an engine.

    Args:
        with_prompts: whether the log has prompts, and what errors say that may quote them.
    """

    def __init__(self, *, with_prompts: bool = False) -> None:
        self._with_prompts = with_prompts
        self._lock = threading.Lock()
        self._request_ids: dict[str, str] = {}
        self._batches: dict[str, int] = {}
        self._texts: dict[str, tuple[str, str]] = {}

    def expect(self, job_id: str) -> None:
        """Remember that the request under way has made a job."""
        with self._lock:
            self._request_ids[job_id] = REQUEST_ID.get()

    def forget(self, job_id: str) -> None:
        """Forget a job that was not accepted after all."""
        with self._lock:
            self._request_ids.pop(job_id, None)

    def started(self, jobs: Sequence[Job]) -> None:
        """Log the jobs of a batch."""
        with self._lock:
            for job in jobs:
                self._batches[job.id] = len(jobs)
                self._texts[job.id] = (job.request.prompt, job.request.negative_prompt)
        values: dict[str, Any] = {"jobs": [job.id for job in jobs], "batch": len(jobs)}
        if self._with_prompts:
            values["prompts"] = [job.request.prompt for job in jobs]
        _log.info("jobs started", extra=values)

    def ended(self, job: Job) -> None:
        """Log how a job ended, with the milliseconds of each stage."""
        with self._lock:
            request_id = self._request_ids.pop(job.id, "")
            batch = self._batches.pop(job.id, 0)
            self._texts.pop(job.id, None)
        values: dict[str, Any] = {
            "job": job.id,
            "request_id": request_id,
            "client": job.client,
            "state": job.state,
            "batch": batch,
            "images": job.request.num_images,
        }
        if batch:
            values["milliseconds_waited"] = round(1000 * job.seconds_waited, 1)
        if job.result is not None:
            values["checkpoint"] = job.result.contract.name
            values["steps"] = job.result.request.steps
            values["milliseconds"] = milliseconds(job.result)
        if job.error is not None:
            values["error"] = type(job.error).__name__
            if self._with_prompts or isinstance(job.error, EngineError):
                values["reason"] = str(job.error)
        _log.info("job ended", extra=values)

    def refused(self) -> None:
        """Log that the queue was full."""
        _log.warning("queue full")

    def hide_prompts(self, text: str) -> str:
        """Return a text without the prompts of the jobs that are drawn now."""
        with self._lock:
            texts = [text for pair in self._texts.values() for text in pair if text]
        for each in sorted(texts, key=len, reverse=True):
            text = text.replace(each, _HIDDEN)
        return text


def set_up_logs(
    format: Literal["text", "json"], level: str, jobs: JobLog, *, with_prompts: bool = False
) -> None:
    """Write what is logged in this process to stderr, from a level on.

    Other libraries are heard from warnings on. Tracebacks have the prompts of `jobs` hidden, unless
    the log may have them.
    """

    def hide(_: Any, __: str, event: EventDict) -> EventDict:
        if "exception" in event and not with_prompts:
            event["exception"] = jobs.hide_prompts(event["exception"])
        return event

    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_request_id,
        structlog.processors.format_exc_info,
        hide,
    ]
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=True)
    if format == "text":
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("twostep").setLevel(level.upper())
    logging.captureWarnings(True)


def _add_request_id(_: Any, __: str, event: EventDict) -> EventDict:
    request_id = REQUEST_ID.get()
    if request_id:
        event.setdefault("request_id", request_id)
    return event
