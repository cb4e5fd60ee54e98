"""A server says to programs of the same user on this machine that it is there, and how to ask it.

It does so by a small file in a folder that only this user may read. Needs neither torch nor a web
framework.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import twostep
from twostep.files import write_atomically

SWITCH = "TWOSTEP_SERVER"
"""Set to "off", servers do not announce themselves and commands draw by themselves."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""What says how many threads compute; the last bits of a picture depend on it."""


@dataclass(frozen=True)
class Announcement:
    """How a server is asked.

    Args:
        address: where it listens, as this machine reaches it.
        key: what it asks of all clients, None for nothing.
        token: what it asks of programs that hand drawings over.
        program: the version of twostep, where it lies, and what says how many threads compute.
    """

    address: str
    key: str | None
    token: str
    program: tuple[str, ...]


def this_program() -> tuple[str, ...]:
    """Return what must be the same for two processes to draw the same pictures."""
    threads = [os.environ.get(name, "") for name in _THREADS]
    return (twostep.__version__, str(Path(twostep.__file__).parent.resolve()), *threads)


def is_switched_off() -> bool:
    """Whether this user wants nothing to be handed over."""
    return os.environ.get(SWITCH, "").strip().lower() in ("off", "0", "no")


def folder_of_announcements() -> Path:
    """Return the folder: that of this login where the system has one, else in the user's cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "twostep"
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "twostep" / "servers"


@contextmanager
def announced(announcement: Announcement) -> Iterator[None]:
    """Announce a server during the block; does nothing where the folder cannot be written."""
    folder = folder_of_announcements()
    path = folder / f"{os.getpid()}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)  # before anything secret is in it
        with write_atomically(path) as file:
            file.write(json.dumps(asdict(announcement)).encode())
    except (OSError, twostep.TwostepError):
        yield  # a server can do without
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def announcements() -> list[tuple[Path, Announcement]]:
    """Return this user's servers that run the same program, the latest first, with their files.

    They may have died since. What others could have written is not read.
    """
    folder = folder_of_announcements()
    if not _is_private(folder):
        return []
    found = []
    for path in folder.glob("*.json"):
        # What cannot be read is of another version, or just being removed.
        with suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(path.read_bytes())
            values["program"] = tuple(values["program"])
            announcement = Announcement(**values)
            if announcement.program == this_program():
                found.append((path.stat().st_mtime, path, announcement))
    found.sort(key=lambda each: each[0], reverse=True)
    return [(path, announcement) for _, path, announcement in found]


def _is_private(folder: Path) -> bool:
    """Whether a folder is there, this user's, and nobody else's to write to."""
    try:
        status = folder.stat()
    except OSError:
        return False
    if sys.platform == "win32":
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o077
