"""The folder of a run: `run.toml`, `log.jsonl`, `checkpoints/`, `samples/`. The same command again
resumes.

Files appear whole or not at all: each is written beside its place and renamed.
"""

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
import torch
from filelock import FileLock, Timeout

from twostep.errors import TwostepError
from twostep.training.processes import world
from twostep.training.recipe import Settings
from twostep.training.shards import exchange_shards


class RunError(TwostepError):
    """A run folder holds another run, is damaged, or cannot be written."""


class RunFolder:
    """One run's folder; opening it creates it, or finds the run that is to be resumed.

    Of several processes that train as one all read it, and the first writes.
    """

    def __init__(self, path: Path, recipe: Settings) -> None:
        """Open `path` for a run of `recipe`; RunError if it holds a run of another recipe or cannot
        be written.
        """
        self.path = path
        self.hear: Callable[[dict[str, Any]], None] = lambda values: None
        record = path / "run.toml"
        resolved = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
        if record.exists() and record.read_text() != resolved:
            raise RunError(
                f"{path} holds a run of another recipe. Give another --out, or delete that folder."
            )
        with _writing(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        # Held until this folder is forgotten or the process ends, however it ends.
        self._lock = FileLock(path / "run.lock", is_singleton=True)
        try:
            if world().is_first:
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise RunError(
                f"Another process is at work in {path}. Wait for it, or give another --out."
            ) from error
        if not record.exists():
            with write_whole(record) as file:
                file.write(resolved.encode())

    def log(self, **values: Any) -> None:
        """Append one line of JSON to log.jsonl, stamped with the time."""
        if not world().is_first:
            return
        line = json.dumps({"time": round(time.time(), 3), **values})
        with _writing(self.path), (self.path / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        self.hear(values)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint; the old one of that name stands until the new one is whole. Every
        process must call it.
        """
        path, shards = self.checkpoint(name), self._shards(name, state)
        with _writing(shards):
            state = exchange_shards(state, shards, write=True)
        if world().is_first:
            with write_whole(path) as file:
                torch.save(state, file)
            for old in set(path.parent.glob(f"{name}.*.shards")) - {shards}:
                shutil.rmtree(old, ignore_errors=True)

    def load(self, name: str) -> dict[str, Any] | None:
        """Read a checkpoint, None if there is none yet; RunError if it is damaged."""
        path = self.checkpoint(name)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return exchange_shards(state, self._shards(name, state), write=False)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise RunError(
                f"{path} is damaged ({error}). Delete it; the run starts this part again."
            ) from error

    def checkpoint(self, name: str) -> Path:
        """Return the path of the checkpoint of that name."""
        return self.path / "checkpoints" / f"{name}.pt"

    def _shards(self, name: str, state: dict[str, Any]) -> Path:
        return self.path / "checkpoints" / f"{name}.{state.get('iteration')}.shards"


@contextmanager
def write_whole(path: Path) -> Iterator[Any]:
    """Open a file for binary writing that takes its place at `path` only when it is whole and on
    disk.

    What any but the first of several processes writes is thrown away.
    """
    if not world().is_first:
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    partial = path.with_name(path.name + ".partial")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = (
            "the disk is full; free some space"
            if error.errno == errno.ENOSPC
            else "give another place"
        )
        raise RunError(
            f"{path} cannot be written ({error.strerror}): {full}. What was saved before is whole."
        ) from error
