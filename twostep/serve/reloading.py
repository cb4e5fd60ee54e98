"""Models and LoRAs that come, change and go while a server runs.

Folders and files are looked at every few seconds; nothing of the system tells of changes on all the
disks that models lie on. What has changed is taken up once it has been the same at two looks and
its weights are whole, so nothing is read that is still being written. Jobs that are drawn meanwhile
end on the model that they began with, which is in memory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from twostep.contract import Contract
from twostep.errors import TwostepError
from twostep.files import PARTIAL_SUFFIX
from twostep.formats import read_contracts
from twostep.formats.header import read_header
from twostep.formats.locate import CONTRACT_FILE, INDEX_FILE, ModelError
from twostep.serve.catalogue import Catalogue, Stock, take_stock

_WEIGHTS = ".safetensors"

_SOON = 0.5
"""Seconds until the next look where something has not settled."""

_Key = tuple[str, str]
"""What is served of a place, "model" or "lora", and the place."""

Stamp = tuple[tuple[str, int, int, int], ...]
"""The state of a place: name, bytes, time of change and inode of each file. Empty for nothing."""

_log = logging.getLogger(__name__)


@runtime_checkable
class Forgets(Protocol):
    """What keeps loaded models, as a studio does."""

    def forget(self, model: str) -> None:
        """Read a model again when it is next asked for."""


@dataclass(frozen=True)
class _Taken:
    """A place as it was taken up. `contracts` are those of a model, none for a LoRA."""

    stamp: Stamp
    contracts: tuple[Contract, ...] = ()


@dataclass
class _Waiting:
    """A place that has changed, since when it has been so, and whether it was found unusable."""

    stamp: Stamp
    since: float
    is_unusable: bool = False


class Watch:
    """Looks after the places that models and LoRAs are served from.

    Args:
        models: the models that were named; a folder of models among them is one of `model_folders`.
        loras: the LoRAs that were named.
        model_folders: folders of which every model is served.
        lora_folders: folders of which every LoRA is served.
        settled_seconds: how long files must stay as they are before they are read.

    What was named comes before what is found. Links that lead out of a folder are not followed.
    Raises ModelError for a folder that is not there, and for what was named and is no model. May be
    used by several threads.
    """

    def __init__(
        self,
        models: Sequence[str],
        loras: Sequence[str] = (),
        model_folders: Sequence[Path] = (),
        lora_folders: Sequence[Path] = (),
        *,
        settled_seconds: float = 1.0,
    ) -> None:
        among_models = [place for place in models if _is_folder_of_models(Path(place))]
        named = {
            "model": tuple(place for place in models if place not in among_models),
            "lora": tuple(loras),
        }
        self._named = named
        self._folders = {
            "model": [*map(Path, among_models), *model_folders],
            "lora": list(lora_folders),
        }
        for folder in (*self._folders["model"], *self._folders["lora"]):
            if not folder.is_dir():
                raise ModelError(f"{folder} is no folder; make it, or take it out of the settings.")
        self._settled_seconds = settled_seconds
        self._lock = threading.Lock()
        self._waiting: dict[_Key, _Waiting] = {}
        self._told: set[str] = set()
        # Names that are built in and on the hub lie nowhere where they could be changed.
        on_disk = [
            (kind, place) for kind, places in named.items() for place in places if _exists(place)
        ]
        self._taken = {key: _taken(*key, stamp_of(Path(key[1]))) for key in on_disk}
        self._watched = frozenset(on_disk)
        for kind, place in self._found():
            stamp = stamp_of(Path(place))
            if (
                max((changed for *_, changed, _ in stamp), default=0)
                < time.time_ns() - 1e9 * settled_seconds
            ):
                self._judge((kind, place), _Waiting(stamp, 0.0))

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being written, as far as the last look has seen."""
        with self._lock:
            return all(waiting.is_unusable for waiting in self._waiting.values())

    def check(self, model: str) -> None:
        """Raise ModelError if a model's files are not those that were taken up."""
        with self._lock:
            taken = self._taken.get(("model", model))
        if taken is not None and stamp_of(Path(model)) != taken.stamp:
            raise ModelError(f"{model} is being replaced; ask again in a moment.")

    def stock(self) -> Stock:
        """Return what is served now; raises as `take_stock`."""
        with self._lock:
            taken = dict(self._taken)
        places = {}
        for kind, named in self._named.items():
            keys = [(kind, place) for place in named]
            places[kind] = [key[1] for key in keys if key in taken or key not in self._watched]
            more = [place for each, place in taken if each == kind and place not in named]
            places[f"more {kind}"] = sorted(more)

        def read(place: str) -> Sequence[Contract]:
            known = taken.get(("model", place))
            return read_contracts(place) if known is None else known.contracts

        stock, notes = take_stock(
            places["model"],
            places["lora"],
            more_models=places["more model"],
            more_loras=places["more lora"],
            read=read,
        )
        for note in notes:
            self._tell(note)
        return stock

    def look(self) -> list[str]:
        """Look at every place once, and return those that have changed and settled."""
        before = self._taken
        places = {*self._found(), *self._watched, *before}
        now = time.monotonic()
        changed = []
        for key in sorted(places):
            stamp = stamp_of(Path(key[1]))
            if stamp == (before[key].stamp if key in before else ()):
                self._waiting.pop(key, None)
                continue
            waiting = self._waiting.get(key)
            if waiting is None or waiting.stamp != stamp:
                self._waiting[key] = _Waiting(stamp, now)
                continue
            has_settled = now - waiting.since >= self._settled_seconds
            if has_settled and not waiting.is_unusable and self._judge(key, waiting):
                changed.append(key[1])
        return changed

    def _judge(self, key: _Key, waiting: _Waiting) -> bool:
        """Take up a place that has settled, or let go of it; tells whether that changes a thing."""
        taken = None
        if waiting.stamp:
            try:
                taken = _taken(*key, waiting.stamp)
            except TwostepError as error:
                waiting.is_unusable = True
                self._waiting[key] = waiting
                self._tell(f"{key[1]} is left out: {error}")
        with self._lock:
            held = key in self._taken
            # A new dictionary, for others read the old one.
            self._taken = {each: old for each, old in self._taken.items() if each != key}
            if taken is not None:
                self._taken[key] = taken
        if not waiting.is_unusable:
            self._waiting.pop(key, None)
        return held or taken is not None

    def _found(self) -> Iterator[_Key]:
        """Yield what lies in the folders and looks like a model or a LoRA."""
        for kind, folders in self._folders.items():
            looks_right = _looks_like_model if kind == "model" else _looks_like_lora
            for folder in folders:
                try:
                    paths = sorted(folder.iterdir())
                except OSError as error:
                    self._tell(f"{folder} cannot be read: {error.strerror}")
                    continue
                for path in paths:
                    if _is_hidden(path) or not looks_right(path):
                        continue
                    if _leads_out(path, folder):
                        self._tell(
                            f"{path} is left out: it leads out of {folder}. Name it instead."
                        )
                        continue
                    yield kind, str(path)

    def _tell(self, sentence: str) -> None:
        """Log a sentence once."""
        if sentence not in self._told:
            self._told.add(sentence)
            _log.warning("%s", sentence)


class Reloader:
    """A thread that keeps a catalogue and studios as a watch finds the disk.

    Args:
        watch: what it looks with.
        catalogue: what is restocked.
        studios: what forgets models that have changed.
        seconds: how often it looks by itself; 0 for never.
    """

    def __init__(
        self, watch: Watch, catalogue: Catalogue, studios: Sequence[Forgets], seconds: float
    ) -> None:
        self._watch = watch
        self._catalogue = catalogue
        self._studios = studios
        self._seconds = seconds
        self._wanted = threading.Event()
        self._is_closing = False
        self._looked = threading.Condition()
        self._num_begun = 0
        self._num_ended = 0
        self._thread = threading.Thread(target=self._work, name="reloads", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at once, as on SIGHUP; returns before that is done."""
        self._wanted.set()

    def catch_up(self, seconds: float) -> bool:
        """Look at once, and wait until nothing is being written any more, but not for longer.

        Returns whether all that lies on the disk now is served. Raises nothing.
        """
        with self._looked:
            # A look that is under way may already have passed what has changed.
            number = self._num_begun + 1
            self.wake()
            return self._looked.wait_for(
                lambda: self._is_closing or (self._num_ended >= number and self._watch.is_settled),
                seconds,
            )

    def close(self) -> None:
        """Look no more."""
        with self._looked:
            self._is_closing = True
            self._looked.notify_all()
        self._wanted.set()
        self._thread.join()

    def look(self) -> None:
        """Look once, and serve what has changed and settled."""
        changed = self._watch.look()
        if not changed:
            return
        try:
            self._catalogue.restock(self._watch.stock())
        except TwostepError as error:
            # What was named clashes now; what is served stays until that is put right.
            _log.error("the models were not taken up again: %s", error)
        for place in changed:
            for studio in self._studios:
                studio.forget(place)
            _log.info("taken up again", extra={"place": place})

    def _work(self) -> None:
        while True:
            # What is not settled yet is looked at again soon, also where nothing is by itself.
            seconds = self._seconds if self._watch.is_settled else _SOON
            self._wanted.wait(seconds or None)
            self._wanted.clear()
            if self._is_closing:
                return
            with self._looked:
                self._num_begun += 1
            try:
                self.look()
            except Exception:
                # A disk that does not answer must not end the watch over it.
                _log.exception("a look at the models failed")
            with self._looked:
                self._num_ended = self._num_begun
                self._looked.notify_all()


def stamp_of(place: Path) -> Stamp:
    """Return the state of a file, or of all files below a folder; () where there is nothing."""
    stamps = []
    for path in _files_of(place):
        try:
            status = path.stat()
        except OSError:
            continue  # it went meanwhile, or is a link to nothing
        name = path.relative_to(place).as_posix()
        stamps.append((name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(stamps)


def _files_of(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    found = []
    for folder, folders, names in os.walk(place, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names]
    return sorted(path for path in found if not _is_hidden(path))


def _taken(kind: str, place: str, stamp: Stamp) -> _Taken:
    """Return a place whose weights are whole; raises TwostepError for anything else."""
    taken = _Taken(stamp, tuple(read_contracts(place)) if kind == "model" else ())
    for path in _files_of(Path(place)):
        if path.suffix == _WEIGHTS:
            read_header(path)
    if stamp_of(Path(place)) != stamp:
        raise ModelError("it is still being written.")
    return taken


def _exists(place: str) -> bool:
    return Path(place).exists()


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(PARTIAL_SUFFIX)


def _is_model_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONTRACT_FILE, INDEX_FILE))


def _looks_like_model(path: Path) -> bool:
    return (path.suffix == _WEIGHTS and path.is_file()) or _is_model_folder(path)


def _looks_like_lora(path: Path) -> bool:
    if path.is_file():
        return path.suffix == _WEIGHTS
    return not _is_model_folder(path) and any(path.glob(f"*{_WEIGHTS}"))


def _is_folder_of_models(path: Path) -> bool:
    """Whether a path is a folder that is no model itself, and has some in it."""
    return (
        path.is_dir() and not _is_model_folder(path) and any(map(_is_model_folder, path.iterdir()))
    )


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether a path, or any file below it, really lies elsewhere than in a folder."""
    root = folder.resolve()
    return not all(each.resolve().is_relative_to(root) for each in (path, *_files_of(path)))
