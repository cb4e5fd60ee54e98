"""The folder of a run: `run.toml`, `log.jsonl`, `checkpoints/`, `samples/`.

The same command with the same folder resumes the run. Files appear whole or not at all, so a run
may be killed at any time.
"""

import json
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
from twostep.files import (
    PARTIAL_SUFFIX,
    WriteError,
    reporting_write_errors,
    write_atomically,
)
from twostep.training.processes import world
from twostep.training.recipe import Settings
from twostep.training.shards import exchange_shards


class RunError(TwostepError):
    """A run folder holds another run, is damaged, or cannot be written."""


class RunFolder:
    """The folder of one run, which is created, or opened again to resume the run.

    Of several processes that train together every one opens the folder and reads; only the first
    one writes, apart from shards, of which each process writes its own.

    Attributes:
        path: the folder.
        on_log: called with the values of every line that is logged; replaced by trackers.
    """

    def __init__(self, path: Path, recipe: Settings) -> None:
        """Open the folder for a run of a recipe.

        Raises:
            RunError: the folder holds a run of another recipe, another process is at work in it,
                or it cannot be written.
        """
        self.path = path
        self.on_log: Callable[[dict[str, Any]], None] = lambda values: None
        resolved = tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))
        record = path / "run.toml"
        if record.exists() and record.read_text() != resolved:
            raise RunError(
                f"{path} holds a run of another recipe. Give another --out, or delete that folder."
            )
        with _as_run_error(), reporting_write_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "samples").mkdir(exist_ok=True)
        self._lock = FileLock(path / "run.lock", is_singleton=True)
        if not world().is_first:
            return
        # Held until this object is deleted or the process ends, however it ends.
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise RunError(
                f"Another process is at work in {path}. Wait for it, or give another --out."
            ) from error
        with _as_run_error():
            if not record.exists():
                with write_atomically(record) as file:
                    file.write(resolved.encode())
            self._remove_partial_files()

    def log(self, **values: Any) -> None:
        """Append one line of JSON to log.jsonl, stamped with the time."""
        if not world().is_first:
            return
        line = json.dumps({"time": round(time.time(), 3), **values})
        path = self.path / "log.jsonl"
        with _as_run_error(), reporting_write_errors(path), path.open("a") as file:
            file.write(line + "\n")
        self.on_log(values)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint; the old one of that name stays until the new one is complete.

        Every process must call it, because each writes its shards of the tensors in `state`.
        """
        path = self.checkpoint(name)
        shards = self._shards(name, state)
        with _as_run_error():
            with reporting_write_errors(shards):
                state = exchange_shards(state, shards, write=True)
            if not world().is_first:
                return
            with write_atomically(path) as file:
                torch.save(state, file)
        for old in set(path.parent.glob(f"{name}.*.shards")) - {shards}:
            shutil.rmtree(old, ignore_errors=True)

    def load(self, name: str) -> dict[str, Any] | None:
        """Read a checkpoint; None if there is none yet, RunError if it is damaged."""
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
        """Return the path of the checkpoint of a name."""
        return self.path / "checkpoints" / f"{name}.pt"

    def _shards(self, name: str, state: dict[str, Any]) -> Path:
        return self.path / "checkpoints" / f"{name}.{state.get('iteration')}.shards"

    def _remove_partial_files(self) -> None:
        """Remove what a killed process of this run left half written."""
        for folder in ("checkpoints", "samples"):
            for partial in (self.path / folder).glob(f"*{PARTIAL_SUFFIX}"):
                partial.unlink(missing_ok=True)


@contextmanager
def _as_run_error() -> Iterator[None]:
    """Turn a WriteError of the block into a RunError."""
    try:
        yield
    except WriteError as error:
        raise RunError(str(error)) from error
