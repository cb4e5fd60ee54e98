"""Writing files that appear whole or not at all.

This module knows neither torch nor processes that train together: whoever runs in several processes
decides which of them writes.
"""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from twostep.errors import TwostepError, reason_of

if TYPE_CHECKING:
    from filelock import FileLock

if sys.platform != "win32":
    import fcntl

PARTIAL_SUFFIX = ".partial"
"""How the name of a file ends while it is being written."""

UNHARMED = "What was saved before is whole."
"""What is true of every failed write: nothing is written in place."""

_LEFTOVER = re.compile(rf".*\.[0-9a-f]+{re.escape(PARTIAL_SUFFIX)}")
"""The names of what a killed process left half written."""

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your share of the disk is used up; free some space",
    errno.EFBIG: "it is larger than a file may be there; give another place, or raise the limit",
    errno.EACCES: "give another place, or change who may use this one",
    errno.EPERM: "give another place, or change who may use this one",
    errno.EROFS: "nothing can be written there; give another place",
    errno.EISDIR: "there is a folder of that name; give the name of a file",
    errno.EEXIST: "there is a file where a folder should be; give another place",
    errno.ENOTDIR: "a part of its path is a file; give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "there is nothing of that name; check it",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.EIO: "the disk does not answer as it should; give another place, and look after it",
}
"""What to do about what a system refuses."""

# File systems allow 255 bytes in a name; the random part and the suffix need some of them.
_MAX_NAME_LETTERS = 50

_MAX_ATTEMPTS = 5
"""To make a partial file that no other process takes for abandoned before it is locked."""


_CACHE_VARIABLE = "TWOSTEP_CACHE"
"""Names another place for `cache_folder`."""


def cache_folder() -> Path:
    """Return where lies what can be made anew: `$TWOSTEP_CACHE`, or `twostep` in the user's cache.

    It need not exist yet.
    """
    place = os.environ.get(_CACHE_VARIABLE)
    if place:
        return Path(place).expanduser()
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user).expanduser() / "twostep"


class WriteError(TwostepError):
    """A file or folder cannot be written."""


@contextmanager
def write_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file for binary writing that takes its place at `path` only once it is complete.

    The bytes go into a partial file beside `path`, are flushed to the disk, and the partial file
    is renamed. If the block raises, the partial file is removed and an older file at `path` stays
    as it was. Every call has a partial file of its own, so when several threads or processes write
    the same path at once, one of their complete files stands there in the end. Missing parent
    folders are created.

    Raises:
        WriteError: the disk is full, or the place cannot be written.
    """
    path = Path(path)
    with reporting_write_errors(path), _partial(path, _create_file) as partial:
        with partial.open("wb") as file:
            yield file
            file.flush()
            # Without this a power failure after the rename could leave an empty file.
            os.fsync(file.fileno())
        partial.replace(path)


def write_new(names: Iterable[str | Path], data: bytes) -> Path:
    """Write a file under the first of the names that no other content has.

    A file that has the same content already is left as it is. Several threads or processes may
    write at once: none replaces what another one wrote. Missing parent folders are created.

    Returns the name. Raises WriteError as `write_atomically`.
    """
    for path in map(Path, names):
        with reporting_write_errors(path):
            with _partial(path, _create_file) as partial:
                with partial.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if _claim(partial, path):
                    return path
            if path.is_file() and path.read_bytes() == data:
                return path
    raise WriteError("none of the names is free: give another place.")


def _claim(partial: Path, path: Path) -> bool:
    """Give a complete file its name; False where there is something of that name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without links: the name is taken first, and the file moved there.
        try:
            path.open("xb").close()
        except FileExistsError:
            return False
        partial.replace(path)
    return True


@contextmanager
def folder_atomically(path: str | Path) -> Iterator[Path]:
    """Give a new folder to be filled that takes its place at `path` only once it is complete.

    If the block raises, nothing is left of it. Where there is a folder at `path` already, the files
    take their places in it one by one in the end, and what else is there stays.

    Raises:
        WriteError: the disk is full, or the place cannot be written.
    """
    path = Path(path)
    with reporting_write_errors(path), _partial(path, Path.mkdir) as partial:
        try:
            yield partial
        except WriteError as error:
            # Of a file in it, which has a name of its own only once it is complete.
            raise WriteError(str(error).replace(str(partial), str(path))) from error
        if _give_name(partial, path):
            return
        for file in sorted(partial.rglob("*")):
            if file.is_file():
                place = path / file.relative_to(partial)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)


def _give_name(partial: Path, path: Path) -> bool:
    """Give a complete folder its name; False where there is a folder of that name."""
    if path.is_dir():
        return False
    try:
        partial.replace(path)
    except OSError:
        if path.is_dir():
            # Another process was faster.
            return False
        raise
    return True


@contextmanager
def _partial(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Give a new file or folder beside `path` that is removed in the end, if it is still there.

    It is locked meanwhile. So what a killed process left of the same name is known by being
    unlocked, and is removed first.

    Args:
        path: what shall be written; missing parent folders are created.
        create: makes the partial file or folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial, lock = _create_locked(path, create)
    try:
        yield partial
    finally:
        _remove(partial)
        if lock is not None:
            os.close(lock)


def _create_locked(path: Path, create: Callable[[Path], None]) -> tuple[Path, int | None]:
    """Create a partial file or folder; return it with its lock, None where there are no locks."""
    # What is written to a partial folder as a whole lies in it meanwhile, and goes with it.
    beside = path / "all" if path.is_dir() and _LEFTOVER.fullmatch(path.name) else path
    stem = beside.name[:_MAX_NAME_LETTERS]
    for _ in range(_MAX_ATTEMPTS):
        partial = beside.with_name(f"{stem}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        create(partial)
        lock = _lock(partial)
        if lock is not None and partial.exists():
            return partial, lock
        # Another process took it for abandoned before it was locked, or there are no locks here.
        if lock is not None:
            os.close(lock)
        _remove(partial)
    create(partial)
    return partial, None


def _create_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed processes left half written of a file or folder."""
    prefix = re.escape(path.name[:_MAX_NAME_LETTERS])
    pattern = re.compile(rf"{prefix}\.[0-9a-f]+{re.escape(PARTIAL_SUFFIX)}")
    with suppress(OSError):
        # A folder that may not be listed can be written all the same.
        for name in filter(pattern.fullmatch, os.listdir(path.parent)):
            other = path.with_name(name)
            lock = _lock(other)
            if lock is not None:
                _remove(other)
                os.close(lock)


def _lock(path: Path) -> int | None:
    """Lock a file or folder until the descriptor that is returned is closed, or the process ends.

    Returns None if another process has locked it, it is no more, or the system has no such locks.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove(partial: Path) -> None:
    """Remove a partial file or folder, as far as that is possible."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def reporting_write_errors(path: str | Path) -> Iterator[None]:
    """Turn every OSError of the block into a WriteError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written ({reason_of(error)}): {advice_on(error)}. {UNHARMED}"
        ) from error


def advice_on(error: OSError) -> str:
    """Return what to do about what the system refused, in a few words without a full stop."""
    return _ADVICE.get(error.errno or 0, "give another place, or mend it")


def remove_leftovers(folder: str | Path, *, within: tuple[str, ...] = ()) -> None:
    """Remove what killed processes left half written in a folder.

    Only for places that no other process writes to.

    Args:
        folder: whose own files and folders are looked at.
        within: its subfolders that are looked at to any depth.

    Raises:
        WriteError: something cannot be removed.
    """
    with reporting_write_errors(folder):
        pattern = f"*{PARTIAL_SUFFIX}"
        paths = list(Path(folder).glob(pattern))
        for name in within:
            paths += (Path(folder) / name).rglob(pattern)
        for path in sorted(paths):
            if not _LEFTOVER.fullmatch(path.name):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                # Missing, if it lay in a folder that was one itself.
                path.unlink(missing_ok=True)


def acquire_folder(folder: str | Path, lock: "FileLock") -> None:
    """Acquire the lock of a folder at once, until it is released or this process ends.

    Raises:
        WriteError: another process holds it, and so is at work in the folder.
    """
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise WriteError(
            f"Another process is at work in {folder}. Wait for it, or give another --out."
        ) from error


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder during the block, and remove what killed ones left.

    The folder is created if it is missing. Whatever ends this process gives the folder back.

    Raises:
        WriteError: another process is at work in it, or it cannot be written.
    """
    # Imported here, for every command imports this module and few lock anything.
    from filelock import FileLock

    folder = Path(folder)
    with reporting_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", is_singleton=True)
        acquire_folder(folder, lock)
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()
