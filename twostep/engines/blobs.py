"""Compiled networks on the disk, so that a network is compiled once for every size.

Each lies in a file of its own in `engines` of the package's cache folder, under a fingerprint of
everything that it depends on. What was damaged or made by another version is made anew, and what
was used longest ago is removed when all together take more than `MAX_BYTES`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from twostep.errors import TwostepError
from twostep.files import WriteError, cache_folder, write_atomically
from twostep.models.runtime import say

MAX_BYTES = 16 * 2**30
"""What all blobs together may take on the disk."""

_SUFFIX = ".blob"
_MAGIC = b"twostep1"
_ALIGNMENT = 4096
"""The body begins at a page, so that it can be mapped into memory."""


_Graph = TypeVar("_Graph")


class BlobError(TwostepError):
    """A blob that is damaged."""


@dataclass(frozen=True, eq=False)
class Blob:
    """A compiled network: what is said of it, in JSON, and its bytes."""

    description: dict[str, Any]
    body: np.ndarray


def blob_folder() -> Path:
    """Return the folder of the blobs, which need not exist yet."""
    return cache_folder() / "engines"


def fingerprint(facts: Mapping[str, object]) -> str:
    """Return 32 hex digits for everything that a compiled network depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_blob(name: str) -> Blob | None:
    """Return the blob of a fingerprint, mapped into memory; None where there is none.

    Raises BlobError for one that is cut off or changed.
    """
    path = _path(name)
    try:
        with path.open("rb") as file:
            head = file.read(16)
            length = int.from_bytes(head[8:], "little")
            if head[:8] != _MAGIC or not 0 < length < _ALIGNMENT * 256:
                raise BlobError(f"{path} is no blob.")
            header = json.loads(file.read(length))
        start = _start(length)
        num_bytes = path.stat().st_size - start
        if num_bytes != header["num_bytes"]:
            raise BlobError(f"{path} has {num_bytes} bytes instead of {header['num_bytes']}.")
        # OpenVINO takes no memory that it might not write to; what it writes stays its own.
        body = np.memmap(path, np.uint8, mode="c", offset=start)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BlobError(f"{path} cannot be read: {error!r}.") from error
    if _digest(body) != header["digest"]:
        raise BlobError(f"{path} is damaged.")
    with suppress(OSError):
        os.utime(path)  # by which it is known to have been used
    return Blob(header["description"], body)


def restored(
    name: str,
    load: Callable[[Blob], _Graph],
    *,
    what: str,
    errors: tuple[type[Exception], ...] = (Exception,),
) -> _Graph | None:
    """Return what a runtime makes of the blob of a fingerprint; None where there is none of use.

    One that is of no use is removed, and whoever draws is told.

    Args:
        name: The fingerprint.
        load: Gives the blob to the runtime.
        what: What it holds, for a person.
        errors: What the runtime raises of what it cannot use, beside `BlobError`.
    """
    unusable: tuple[type[Exception], ...] = (BlobError, *errors)
    try:
        blob = read_blob(name)
        return None if blob is None else load(blob)
    except MemoryError:
        raise
    except unusable as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"{what} in {blob_folder()} was not usable and is made anew ({reason})")
        forget_blob(name)
        return None


def has_room(num_bytes: int) -> bool:
    """Return whether a blob of this size would be kept.

    Not where it would take half of what is free on the disk, and not where the folder cannot be
    made.
    """
    folder = blob_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return num_bytes <= min(MAX_BYTES, shutil.disk_usage(folder).free // 2)
    except OSError:
        return False


def write_blob(name: str, description: Mapping[str, Any], body: bytes) -> bool:
    """Keep a compiled network under its fingerprint.

    Returns whether it was kept: not where there is no room for it, and not where the folder cannot
    be written.
    """
    path = _path(name)
    if not has_room(len(body)):
        return False
    try:
        header = {
            "description": description,
            "num_bytes": len(body),
            "digest": _digest(np.frombuffer(body, np.uint8)),
        }
        text = json.dumps(header).encode()
        with write_atomically(path) as file:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            file.write(bytes(_start(len(text)) - 16 - len(text)))
            file.write(body)
    except (OSError, WriteError):
        return False
    _make_room(keep=path)
    return True


def forget_blob(name: str) -> None:
    """Remove the blob of a fingerprint, if it is there and can be removed."""
    with suppress(OSError):
        _path(name).unlink()


def _make_room(keep: Path) -> None:
    """Remove what was used longest ago until the others fit."""
    files = []
    for path in keep.parent.glob(f"*{_SUFFIX}"):
        with suppress(OSError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            return
        if path != keep:
            with suppress(OSError):
                path.unlink()
            total -= size


def _path(name: str) -> Path:
    return blob_folder() / f"{name}{_SUFFIX}"


def _start(header_length: int) -> int:
    """Return where the body begins behind a header of so many bytes."""
    return -(-(16 + header_length) // _ALIGNMENT) * _ALIGNMENT


def _digest(body: np.ndarray) -> str:
    return hashlib.blake2b(body.data, digest_size=16).hexdigest()
