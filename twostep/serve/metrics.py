"""Figures of a server for Prometheus: the queue, batches, stages and ends of jobs."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from twostep.serve.config import Verdict
from twostep.serve.engine import Engine, Job

_BATCH_SIZES = (1, 2, 4, 8, 16)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts what an engine does; give it to one as an observer, and let it `watch` that."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._jobs = Counter(
            "twostep_jobs", "Jobs that ended, by how.", ["state"], registry=registry
        )
        self._refused = Counter(
            "twostep_refused", "Jobs that a full queue turned away.", registry=registry
        )
        self._images = Counter("twostep_images", "Pictures that were drawn.", registry=registry)
        self._batch = Histogram(
            "twostep_batch_jobs",
            "Jobs that were drawn together.",
            buckets=_BATCH_SIZES,
            registry=registry,
        )
        self._wait = Histogram(
            "twostep_wait_seconds",
            "How long jobs waited before they were drawn.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "twostep_stage_seconds",
            "What a stage of a job took; of a shared batch, its share.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )

        self._verdicts = Counter(
            "twostep_filtered",
            "Pictures that the filter has judged, by verdict.",
            ["verdict"],
            registry=registry,
        )

    def judged(self, verdict: Verdict) -> None:
        """Count what the filter did with a picture."""
        self._verdicts.labels(verdict).inc()

    def watch(self, engine: Engine) -> None:
        """Show how many jobs of an engine wait and are drawn at the moment."""
        waiting = Gauge("twostep_jobs_waiting", "Jobs that wait.", registry=self._registry)
        waiting.set_function(lambda: engine.num_waiting)
        drawing = Gauge("twostep_jobs_drawing", "Jobs under way.", registry=self._registry)
        drawing.set_function(lambda: engine.num_drawing)

    def started(self, jobs: Sequence[Job]) -> None:
        """Count a batch, and how long its jobs waited."""
        self._batch.observe(len(jobs))
        for job in jobs:
            self._wait.observe(job.seconds_waited)

    def ended(self, job: Job) -> None:
        """Count the end of a job, and its pictures and stages."""
        self._jobs.labels(job.state).inc()
        if job.result is None:
            return
        self._images.inc(len(job.result.images))
        for stage, seconds in job.result.seconds.items():
            self._stages.labels(stage).observe(seconds)

    def refused(self) -> None:
        """Count a job that was turned away."""
        self._refused.inc()

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
