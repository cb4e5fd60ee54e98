"""Accepted jobs in a file, so that they outlive the server.

The file is an SQLite database. A job of the server's own API is written there before it is
accepted, and what came of it when it ends, pictures included. What a killed server left unfinished
is drawn when the next one is started with the same file.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twostep.errors import TwostepError
from twostep.media.codec import Encoded
from twostep.media.png import encode_png
from twostep.serve.engine import ClosingError, Job
from twostep.serve.following import answer_of
from twostep.serve.items import encode, poster_of
from twostep.serve.shapes import SUFFIXES, UNKNOWN_SUFFIX, JobAnswer, JobBody

MAX_STORED_ENDS = 1000
"""How many ended jobs can still be asked for; older ones are deleted."""

_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL,
    body TEXT,
    answer TEXT
);
CREATE TABLE IF NOT EXISTS images (
    id TEXT NOT NULL REFERENCES jobs(id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    data BLOB NOT NULL,
    mime TEXT NOT NULL DEFAULT 'image/png',
    poster BLOB,
    PRIMARY KEY (id, place)
);
"""
"""A job has a body until it ends, and then an answer. Images are items of any medium, with their
MIME types and the PNGs that are shown of those that are no pictures.
"""

_FROM_VERSION_1 = """
BEGIN;
ALTER TABLE images ADD COLUMN mime TEXT NOT NULL DEFAULT 'image/png';
ALTER TABLE images ADD COLUMN poster BLOB;
PRAGMA user_version = 2;
COMMIT;
"""
"""What makes the tables of a file in which all items were PNGs those of today."""

_log = logging.getLogger(__name__)


class StoreError(TwostepError):
    """A file that cannot be used for jobs."""


@dataclass(frozen=True)
class StoredItem:
    """An item of a job that is done: its file, and the PNG that is shown of it, if it has one."""

    file: Encoded
    poster: bytes | None = None


@dataclass(frozen=True)
class StoredJob:
    """A job that was accepted and has not ended. The seed of its body is settled."""

    id: str
    client: str
    body: JobBody


class JobStore:
    """The jobs in a file; an observer of the engine that draws them.

    Pictures are written down by a thread of its own, so that devices go on drawing while they are
    encoded and the disk is waited for. A server that is killed before draws the same ones again.
    Other ends are written down at once: what was cancelled is not drawn after a kill.

    Args:
        path: the file, which is made where it is missing.

    Raises StoreError if another server has it, or it holds something else. All methods may be
    called by any thread.
    """

    def __init__(self, path: Path) -> None:
        self._thread_lock = threading.RLock()
        self._file_lock = FileLock(f"{path}.lock", blocking=False)
        try:
            self._file_lock.acquire()
        except Timeout as error:
            raise StoreError(f"another server has {path}; give a file of its own.") from error
        except OSError as error:
            raise StoreError(f"cannot write beside {path}: {error}.") from error
        try:
            self._rows = self._opened(path)
        except sqlite3.Error as error:
            self._file_lock.release()
            raise StoreError(f"{path} cannot hold jobs: {error}. Give another file.") from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writes-jobs")

    def add(self, job: StoredJob) -> None:
        """Write a job down before it is accepted; once this returns it survives a kill.

        Raises StoreError where it cannot be written.
        """
        values = (job.id, job.client, job.body.model_dump_json())
        try:
            with self._thread_lock, self._rows:
                self._rows.execute("INSERT INTO jobs (id, client, body) VALUES (?, ?, ?)", values)
        except sqlite3.Error as error:
            raise StoreError(f"the job cannot be written down: {error}.") from error

    def drop(self, job_id: str) -> None:
        """Forget a job that was not accepted after all."""
        with self._thread_lock, self._rows:
            self._rows.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def unfinished(self) -> list[StoredJob]:
        """Return the jobs that have not ended, in the order in which they came."""
        self._writer.submit(lambda: None).result()  # what has ended by now is written down
        query = "SELECT id, client, body FROM jobs WHERE answer IS NULL ORDER BY number"
        with self._thread_lock:
            rows = self._rows.execute(query).fetchall()
        return [
            StoredJob(job_id, client, JobBody.model_validate_json(body))
            for job_id, client, body in rows
        ]

    def finish(self, answer: JobAnswer, items: Sequence[StoredItem] = ()) -> None:
        """Write down what came of a job; of one that was never added, nothing."""
        with self._thread_lock, self._rows:
            update = "UPDATE jobs SET answer = ?, body = NULL WHERE id = ? AND answer IS NULL"
            values = (answer.model_dump_json(), answer.id)
            if not self._rows.execute(update, values).rowcount:
                return
            self._rows.executemany(
                "INSERT INTO images (id, place, data, mime, poster) VALUES (?, ?, ?, ?, ?)",
                [
                    (answer.id, place, item.file.data, item.file.mime, item.poster)
                    for place, item in enumerate(items)
                ],
            )
            self._rows.execute(
                "DELETE FROM jobs WHERE number IN (SELECT number FROM jobs WHERE answer IS NOT NULL"
                " ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (MAX_STORED_ENDS,),
            )

    def find(self, job_id: str) -> JobAnswer | None:
        """Return what came of a job that has ended."""
        row = self._row("SELECT answer FROM jobs WHERE id = ?", job_id)
        return None if row is None or row[0] is None else JobAnswer.model_validate_json(row[0])

    def item(self, job_id: str, place: int) -> StoredItem | None:
        """Return an item of a job that is done, None where there is none."""
        query = "SELECT data, mime, poster FROM images WHERE id = ? AND place = ?"
        row = self._row(query, job_id, place)
        if row is None:
            return None
        data, mime, poster = row
        suffix = SUFFIXES.get(mime, UNKNOWN_SUFFIX)
        return StoredItem(Encoded(data, suffix, mime), poster)

    def close(self) -> None:
        """Write down what has ended, and let go of the file."""
        self._writer.shutdown()
        with self._thread_lock:
            self._rows.close()
        self._file_lock.release()

    def started(self, jobs: Sequence[Job]) -> None:
        """Take no note of a beginning: what is not done is drawn anew."""

    def refused(self) -> None:
        """Take no note of what was not accepted."""

    def ended(self, job: Job) -> None:
        """Have it written down how a job ended; one that ended by shutdown stays unfinished."""
        if isinstance(job.error, ClosingError):
            return
        if job.result is None:
            self._write_end(job)
        else:
            self._writer.submit(self._write_end, job)

    def _write_end(self, job: Job) -> None:
        try:
            if self._row("SELECT 1 FROM jobs WHERE id = ?", job.id) is None:
                return
            result = job.result
            items = []
            if result is not None:
                for place, item in enumerate(result.images):
                    poster = poster_of(item)
                    shown = None if poster is None else encode_png(poster, {})
                    items.append(StoredItem(encode(result, place), shown))
            self.finish(answer_of(job), items)
        except Exception:
            # It stays unfinished, and is drawn again by the next server. Clients of this one have
            # it from the engine.
            _log.exception("the end of job %s could not be written down", job.id)

    def _row(self, query: str, *values: object) -> tuple[Any, ...] | None:
        with self._thread_lock:
            row: tuple[Any, ...] | None = self._rows.execute(query, values).fetchone()
        return row

    def _opened(self, path: Path) -> sqlite3.Connection:
        rows = sqlite3.connect(path, check_same_thread=False)
        (version,) = rows.execute("PRAGMA user_version").fetchone()
        (num_tables,) = rows.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version not in (1, _VERSION) and (version or num_tables):
            raise sqlite3.DatabaseError("it is a database of something else")
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute("PRAGMA synchronous = FULL")
        rows.execute("PRAGMA foreign_keys = ON")
        if version == 1:
            rows.executescript(_FROM_VERSION_1)
        rows.executescript(_SCHEMA)
        rows.execute(f"PRAGMA user_version = {_VERSION}")
        return rows
