"""Checkpoint files: what `torch.save` writes, with a note at their end that vouches for every byte.

A file of `torch.save` is a zip archive, and the note is the archive's comment: a JSON object with
the digest of every other byte, and with what can be known of the checkpoint without reading it.
So torch and any zip program read these files too, but only this module notices a flipped bit:
torch itself checks no sums, and would train on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from twostep.errors import TwostepError

_MARK = b"twostep "
_LENGTH_BYTES = 2
"""The last bytes of an archive without a comment: the comment's length, which is zero."""

_LONGEST_NOTE = 4096
_BLOCK_BYTES = 2**22


class DamagedCheckpointError(TwostepError):
    """The bytes of a checkpoint are not those that were written; its message is the reason."""


def write_checkpoint(file: BinaryIO, state: dict[str, Any], note: dict[str, Any]) -> None:
    """Write a state and its note to a file that was opened for writing.

    Args:
        file: an empty file.
        state: nested dictionaries of tensors and plain values.
        note: plain values that `read_note` returns without reading the state.

    Raises:
        OSError: the file cannot be written.
    """
    hashed = _HashedFile(file)
    try:
        torch.save(state, cast("BinaryIO", hashed))
    except RuntimeError as error:
        # Where a write has failed, torch stumbles once more over its own end of the archive.
        raise hashed.failure or error from None
    text = _MARK + json.dumps({**note, "digest": hashed.digest(note)}).encode()
    # The length of the comment is the only part of the archive that the digest leaves out; a
    # reader compares it with the comment that there is.
    file.seek(-_LENGTH_BYTES, os.SEEK_END)
    file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state onto the CPU, after every byte of its file was checked.

    Files that were written before there were notes are checked by their archive's own sums.

    Raises:
        DamagedCheckpointError: a byte is not as it was written.
    """
    try:
        _check(path)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(str(error).splitlines()[0]) from error
    except zipfile.BadZipFile as error:
        raise DamagedCheckpointError(str(error)) from error
    return state


def read_note(path: Path) -> dict[str, Any]:
    """Return the note of a checkpoint; an empty one if it has none, or cannot be read."""
    try:
        return _split(path)[1]
    except (OSError, DamagedCheckpointError):
        return {}


def copied_to_cpu(value: Any) -> Any:
    """Return a state as it is now: its tensors are copied to the CPU, so that training goes on.

    Tensors without data, which stand where shards were, stay as they are.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied_to_cpu(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied_to_cpu(part) for part in value)
    return value


def digest_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the digests of whole files by their names."""
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, _new_digest).hexdigest()
    return digests


def _new_digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _as_bytes(note: dict[str, Any]) -> bytes:
    return json.dumps(note, sort_keys=True).encode()


def _check(path: Path) -> None:
    """Compare a file with the digest in its note, or with the archive's sums if it has none."""
    length, note = _split(path)
    if "digest" not in note:
        with zipfile.ZipFile(path) as archive:
            if archive.comment:
                raise DamagedCheckpointError("its note cannot be read")
            if (name := archive.testzip()) is not None:
                raise DamagedCheckpointError(f"{name} in it is not what was written")
        return
    digest = _new_digest()
    with path.open("rb") as file:
        remaining = length
        while remaining:
            block = file.read(min(_BLOCK_BYTES, remaining))
            digest.update(block)
            remaining -= len(block)
    stated = note.pop("digest")
    digest.update(_as_bytes(note))
    if digest.hexdigest() != stated:
        raise DamagedCheckpointError("its bytes are not those that were written")


def _split(path: Path) -> tuple[int, dict[str, Any]]:
    """Return how many bytes come before the note and its length, and the note."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _LONGEST_NOTE))
        end = file.read()
    start = end.rfind(_MARK)
    if start < _LENGTH_BYTES:
        return size, {}
    comment = end[start:]
    try:
        note = json.loads(comment[len(_MARK) :])
    except ValueError as error:
        raise DamagedCheckpointError("its note cannot be read") from error
    stated = int.from_bytes(end[start - _LENGTH_BYTES : start], "little")
    if stated != len(comment) or not isinstance(note, dict) or "digest" not in note:
        raise DamagedCheckpointError("its note cannot be read")
    return size - len(comment) - _LENGTH_BYTES, note


class _HashedFile:
    """A file for `torch.save` whose bytes are digested on their way, all but the last two.

    Attributes:
        failure: why a write failed, if one did.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = _new_digest()
        self._held_back = b""
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes and return how many."""
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        if len(data) < _LENGTH_BYTES:
            kept = self._held_back + bytes(data)
            self._digest.update(kept[:-_LENGTH_BYTES])
            self._held_back = kept[-_LENGTH_BYTES:]
            return len(data)
        self._digest.update(self._held_back)
        self._digest.update(memoryview(data)[:-_LENGTH_BYTES])
        self._held_back = bytes(data[-_LENGTH_BYTES:])
        return len(data)

    def flush(self) -> None:
        """Leave flushing to whoever opened the file."""

    def digest(self, note: dict[str, Any]) -> str:
        """Return the digest of all bytes but the last two, and of a note."""
        self._digest.update(_as_bytes(note))
        return str(self._digest.hexdigest())
