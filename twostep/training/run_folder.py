"""The folder of a run: `run.toml`, `run.json`, `log.jsonl`, `checkpoints/`, `samples/`.

The same command with the same folder resumes the run. Files appear whole or not at all, and a
checkpoint vouches for its bytes, so a run may be killed at any time.
"""

from __future__ import annotations

import json
import shutil
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from filelock import FileLock
from pydantic import ValidationError

from twostep.errors import TwostepError
from twostep.files import (
    WriteError,
    acquire_folder,
    remove_leftovers,
    reporting_write_errors,
    write_atomically,
)
from twostep.training.checkpoints import (
    DamagedCheckpointError,
    copied_to_cpu,
    digest_files,
    read_checkpoint,
    read_note,
    write_checkpoint,
)
from twostep.training.processes import wait, world
from twostep.training.recipe import RecipeError, Settings, recipe_text
from twostep.training.resuming import Change, Progress, changes, settled, stated_keys
from twostep.training.run_log import read_log
from twostep.training.shards import exchange_shards, has_shards

FINISHED = "-finished"
"""What the name of a part's final weights ends with."""

_DAMAGED_SUFFIX = ".damaged"

_DIGESTS = "shard_digests"
"""Where the state of a sharded checkpoint keeps the digests of its shards' files."""

SettingsT = TypeVar("SettingsT", bound=Settings)


class RunError(TwostepError):
    """A run folder holds another run, is damaged, or cannot be written."""


class RunFolder:
    """The folder of one run, which is created, or opened again to resume the run.

    Of several processes that train together every one opens the folder and reads; only the first
    one writes, apart from shards, of which each process writes its own.

    Attributes:
        path: the folder.
        listeners: each is called with the values of every line that is logged.
        changes: what of the recipe is not what it was when the run was last called.
        deadline: when training stops by itself, in seconds of `time.monotonic`; None for never.
    """

    def __init__(self, path: Path, recipe: Settings) -> None:
        """Open the folder for a run of a recipe.

        Raises:
            RunError: the folder holds a run that this recipe would contradict, another process is
                at work in it, or it cannot be written.
        """
        self.path = path
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.deadline: float | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._lock = FileLock(path / "run.lock", is_singleton=True)
        # First of all: what another process is about to write must not be read before.
        self._enter()
        record = self._read_record()
        before = self._read_recipe(type(recipe))
        self._settings = recipe
        self.changes: tuple[Change, ...] = ()
        if before is not None:
            self._settings = settled(before, recipe, set(record.get("stated", ())))
            self.changes = tuple(changes(before, self._settings, self.progress, self._whole()))
            _refuse([change for change in self.changes if change.refusal is not None], path)
        if not world().is_first:
            return
        if before is None or self.changes:
            self._write_recipe()
        stated = list(stated_keys(recipe))
        # Also where the recipe is there already: whoever wrote it may have been killed here.
        if record.get("stated") != stated:
            self._write_record({**record, "stated": stated})
        with _as_run_error():
            remove_leftovers(path, within=("checkpoints", "samples", "model"))
        if self.changes:
            self.log(part="recipe", changed=[str(change) for change in self.changes])

    def _enter(self) -> None:
        """Make the folder, and keep other processes out of it.

        It is held until this object is deleted or the process ends, however it ends.
        """
        with _as_run_error(), reporting_write_errors(self.path):
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
            if world().is_first:
                acquire_folder(self.path, self._lock)

    def settled(self, recipe: SettingsT) -> SettingsT:
        """Return the recipe under which the run goes on.

        It is the one that was given, but what that one leaves to defaults stays as it was.
        """
        settings = self._settings
        assert isinstance(settings, type(recipe))
        return settings

    def compare_contents(self, contents: Mapping[str, str], *, accept: bool = False) -> list[str]:
        """Compare what a run is made from with what it was made from when it began.

        Args:
            contents: fingerprints by the key of the recipe, as in {"data": "1f..."}.
            accept: whether to go on with something else, and remember that instead.

        Returns:
            The keys behind which there is something else now.

        Raises:
            RunError: something was replaced under a run that has trained already, and that was not
                accepted.
        """
        record = self._read_record()
        known = record.get("contents", {})
        replaced = [key for key, found in contents.items() if known.get(key, found) != found]
        if replaced and not accept and self._whole().status != "new":
            raise RunError(
                f"What {' and '.join(replaced)} names has been replaced since the run in "
                f"{self.path} began: part of it was trained from something else. Put back what was "
                "there, give another --out, or go on all the same with --accept-replaced."
            )
        if world().is_first and {**known, **contents} != known:
            self._write_record({**record, "contents": {**known, **contents}})
            if replaced:
                self.log(part="recipe", replaced=replaced)
        return replaced

    def remembered(self, key: str, fresh: str) -> str:
        """Return what the run has remembered under a key; `fresh`, from now on, if nothing."""
        record = self._read_record()
        if key not in record and world().is_first:
            self._write_record({**record, key: fresh})
        return str(record.get(key, fresh))

    def log(self, **values: Any) -> None:
        """Append one line of JSON to log.jsonl, stamped with the time."""
        if not world().is_first:
            return
        line = json.dumps({"time": round(time.time(), 3), **values})
        path = self.path / "log.jsonl"
        with _as_run_error(), reporting_write_errors(path), path.open("ab+") as file:
            # A killed run may have left half a line.
            if file.tell() > 0:
                file.seek(-1, 2)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(f"{line}\n".encode())
        for listener in self.listeners:
            listener(values)

    def has_logged(self, **values: Any) -> bool:
        """Tell whether a line of log.jsonl has these values, among others."""
        lines, _ = read_log(self.path / "log.jsonl")
        return any(values.items() <= line.items() for line in lines)

    def save(
        self,
        name: str,
        state: dict[str, Any],
        *,
        keep: int = 1,
        examined: bool = True,
        later: bool = False,
    ) -> None:
        """Write a checkpoint; the old one of that name stays until the new one is complete.

        Every process must call it, because each writes its shards of the tensors in `state`.

        Args:
            name: of the checkpoint.
            state: nested dictionaries of tensors and plain values; "iteration" among them says
                which of several checkpoints of that name it is.
            keep: how many of that name are kept, this one and the newest before it.
            examined: whether it was found good; one that was not makes room for the next.
            later: whether to return at once, and write the state as it is now meanwhile. What goes
                wrong then is raised by the next call, or by `finish_writing`. Shards are always
                written before it returns.
        """
        self.finish_writing()
        if has_shards(state):
            shards = self._shards(name, state)
            with _as_run_error(), reporting_write_errors(shards):
                state = exchange_shards(state, shards, write=True)
                if world().is_first:
                    state[_DIGESTS] = digest_files(sorted(shards.glob("*.distcp")))
        if not world().is_first:
            return
        if later:
            copied = copied_to_cpu(state)
            self._pending = self._writer.submit(self._write, name, copied, keep, examined)
        else:
            self._write(name, state, keep, examined)

    def finish_writing(self) -> None:
        """Wait until the last checkpoint is written; RunError if it could not be."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def load(self, name: str, *, only_examined: bool = False) -> dict[str, Any] | None:
        """Read the newest checkpoint of a name whose bytes are right; None if there is none yet.

        Every process must call it.

        Args:
            name: of the checkpoint.
            only_examined: whether to pass over those that nobody found good, if there are others.

        Raises:
            RunError: there are checkpoints, and all are damaged.
        """
        self.finish_writing()
        # So that no process reads what the first one is about to replace.
        wait()
        problems: dict[Path, str] = {}
        paths = self._checkpoints(name)
        if only_examined:
            paths = [path for path in paths if read_note(path).get("examined", True)] or paths
        for path in paths:
            try:
                state = self._read(name, path)
            except DamagedCheckpointError as error:
                problems[path] = f"{path} is damaged ({error})"
                continue
            self._set_apart(problems, used=path)
            return state
        if problems:
            raise RunError(
                f"{'; '.join(problems.values())}. Delete it; the run starts this part again."
            )
        return None

    def _set_apart(self, problems: Mapping[Path, str], *, used: Path) -> None:
        """Say which damaged checkpoints an older one is used for, and rename them."""
        for path, problem in problems.items():
            warnings.warn(f"{problem}. The one before it, {used.name}, is used.", stacklevel=3)
            # Each process has found the same, and has read it.
            wait()
            if world().is_first:
                path.replace(f"{path}{_DAMAGED_SUFFIX}")
                self.log(part="checkpoint", damaged=path.name, used=used.name)

    def delete(self, name: str) -> None:
        """Delete every checkpoint of a name, once nothing can need it any more."""
        self.finish_writing()
        if not world().is_first:
            return
        for path in self._checkpoints(name):
            path.unlink(missing_ok=True)
        for shards in (self.path / "checkpoints").glob(f"{name}.*.shards"):
            shutil.rmtree(shards, ignore_errors=True)

    def progress(self, name: str) -> Progress:
        """Return how far the part of a name is."""
        if self.checkpoint(f"{name}{FINISHED}").exists():
            return Progress("finished")
        paths = self._checkpoints(name)
        if not paths:
            return Progress("new")
        return Progress("running", max(int(read_note(path).get("iteration", 0)) for path in paths))

    def checkpoint(self, name: str) -> Path:
        """Return the path of the newest checkpoint of a name."""
        return self.path / "checkpoints" / f"{name}.pt"

    def _checkpoints(self, name: str) -> list[Path]:
        """Return the checkpoints of a name that there are, the newest first."""
        newest = self.checkpoint(name)
        older = {
            int(path.suffixes[-2][1:]): path
            for path in newest.parent.glob(f"{name}.*.pt")
            if path.suffixes[-2][1:].isdigit()
        }
        paths = [older[iteration] for iteration in sorted(older, reverse=True)]
        return [newest, *paths] if newest.exists() else paths

    def _whole(self) -> Progress:
        """Return how far the run is, of whatever parts it has."""
        paths = list((self.path / "checkpoints").glob("*.pt"))
        if not paths:
            return Progress("new")
        return Progress("running", max(int(read_note(path).get("iteration", 0)) for path in paths))

    def _write(self, name: str, state: dict[str, Any], keep: int, examined: bool) -> None:
        """Write a checkpoint's file, and delete those that are too old."""
        path = self.checkpoint(name)
        note = {"iteration": state["iteration"]} if "iteration" in state else {}
        if not examined:
            note["examined"] = False
        with _as_run_error():
            if keep > 1:
                self._put_aside(path)
            with write_atomically(path) as file:
                write_checkpoint(file, state, note)
        for old in self._checkpoints(name)[keep:]:
            old.unlink(missing_ok=True)
        notes = map(read_note, self._checkpoints(name))
        kept = {self._shards(name, note) for note in notes}
        for shards in path.parent.glob(f"{name}.*.shards"):
            if shards not in kept:
                shutil.rmtree(shards, ignore_errors=True)

    def _put_aside(self, path: Path) -> None:
        """Give the newest checkpoint so far a second name, with its iteration, if it has one."""
        note = read_note(path)
        iteration = note.get("iteration")
        if iteration is None or not note.get("examined", True):
            return
        aside = path.with_name(f"{path.stem}.{iteration:06d}.pt")
        aside.unlink(missing_ok=True)
        try:
            aside.hardlink_to(path)
        except OSError:
            # Not every file system has links.
            with reporting_write_errors(aside):
                shutil.copyfile(path, aside)

    def _read(self, name: str, path: Path) -> dict[str, Any]:
        """Read one checkpoint; DamagedCheckpointError if it is not what was written."""
        state = read_checkpoint(path)
        shards = self._shards(name, state)
        for file, digest in state.pop(_DIGESTS, {}).items():
            found = digest_files([shards / file]) if (shards / file).is_file() else {}
            if found.get(file) != digest:
                raise DamagedCheckpointError(f"{shards / file} is not what was written")
        try:
            return exchange_shards(state, shards, write=False)
        except (RuntimeError, OSError) as error:
            raise DamagedCheckpointError(str(error)) from error

    def _shards(self, name: str, state: dict[str, Any]) -> Path:
        return self.path / "checkpoints" / f"{name}.{state.get('iteration')}.shards"

    def _read_recipe(self, model: type[SettingsT]) -> SettingsT | None:
        """Read the recipe of the run so far; None if there is none yet."""
        record = self.path / "run.toml"
        if not record.exists():
            return None
        try:
            return model.model_validate(tomllib.loads(recipe_text(record)))
        except (tomllib.TOMLDecodeError, RecipeError, ValidationError) as error:
            reason = error.errors()[0] if isinstance(error, ValidationError) else error
            words = reason["msg"] if isinstance(reason, dict) else str(reason)
            place = ".".join(map(str, reason["loc"])) if isinstance(reason, dict) else ""
            raise RunError(
                f"{self.path} holds a run of another recipe, which this version cannot go on with "
                f"({f'{place}: ' if place else ''}{words}). Give another --out, or delete that "
                "folder."
            ) from error

    def _read_record(self) -> dict[str, Any]:
        """Read what is known of the run beside its recipe; nothing of older runs."""
        try:
            values = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write_recipe(self) -> None:
        values = self._settings.model_dump(mode="json", exclude_none=True)
        with _as_run_error(), write_atomically(self.path / "run.toml") as file:
            file.write(tomli_w.dumps(values).encode())

    def _write_record(self, record: dict[str, Any]) -> None:
        with _as_run_error(), write_atomically(self.path / "run.json") as file:
            file.write(json.dumps(record, indent=1).encode())


def _refuse(refused: list[Change], path: Path) -> None:
    """Raise a RunError that names every change that cannot be made."""
    if not refused:
        return
    lines = "; ".join(f"{change} ({change.refusal})" for change in refused)
    raise RunError(
        f"{path} holds a run of another recipe. Changed, but cannot be: {lines}. "
        "Set that back, give another --out, or delete that folder."
    )


@contextmanager
def _as_run_error() -> Iterator[None]:
    """Turn a WriteError of the block into a RunError."""
    try:
        yield
    except WriteError as error:
        raise RunError(str(error)) from error
