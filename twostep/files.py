"""Writing files that appear whole or not at all.

This module knows neither torch nor processes that train together: whoever runs in several processes
decides which of them writes.
"""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from twostep.errors import TwostepError

PARTIAL_SUFFIX = ".partial"
"""How the name of a file ends while it is being written."""

_LEFTOVER = re.compile(rf".*\.[0-9a-f]+{re.escape(PARTIAL_SUFFIX)}")
"""The names of what a killed process left half written."""

_FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your share of the disk is used up; free some space",
    errno.EFBIG: "it is larger than a file may be there; give another place, or raise the limit",
}
"""What to do about errors that say that there is no room."""

# File systems allow 255 bytes in a name; the random part and the suffix need some of them.
_MAX_NAME_LETTERS = 50


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
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        partial = path.with_name(f"{path.name[:_MAX_NAME_LETTERS]}.{token}{PARTIAL_SUFFIX}")
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                # Without this a power failure after the rename could leave an empty file.
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_new(names: Iterable[str | Path], data: bytes) -> Path:
    """Write a file under the first of the names that no other content has.

    A file that has the same content already is left as it is. Several threads or processes may
    write at once: none replaces what another one wrote. Missing parent folders are created.

    Returns the name. Raises WriteError as `write_atomically`.
    """
    for path in map(Path, names):
        with reporting_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(
                f"{path.name[:_MAX_NAME_LETTERS]}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
            )
            try:
                with partial.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if _claim(partial, path):
                    return path
            finally:
                partial.unlink(missing_ok=True)
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
    with reporting_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(
            f"{path.name[:_MAX_NAME_LETTERS]}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
        )
        try:
            partial.mkdir()
            yield partial
            if path.is_dir():
                for file in sorted(partial.rglob("*")):
                    if file.is_file():
                        place = path / file.relative_to(partial)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        file.replace(place)
            else:
                partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def reporting_write_errors(path: str | Path) -> Iterator[None]:
    """Turn every OSError of the block into a WriteError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _FULL.get(error.errno or 0, "give another place")
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}): {advice}. "
            "What was saved before is whole."
        ) from error


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


def acquire_folder(folder: str | Path, lock: FileLock) -> None:
    """Acquire the lock of a folder at once, until it is released or this process ends.

    Raises:
        WriteError: another process holds it, and so is at work in the folder.
    """
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
