"""LoRAs by the hashes of their files, so that they are found again where they were moved."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from twostep.formats.locate import ModelError
from twostep.formats.lora_locate import find_lora_file
from twostep.pipeline.provenance import Provenance, ProvenanceError
from twostep.pipeline.request import LoraChoice, Request


def with_moved_loras(
    request: Request, provenance: Provenance, given: Sequence[str], folders: Sequence[Path]
) -> tuple[Request, list[str]]:
    """Return a request whose LoRAs are there, and what is to be said of those that were moved.

    A LoRA that is not where it was is one of `given`, by its hash or else its name, or a file of
    the same hash in one of the folders or where it was.

    Raises:
        ProvenanceError: If one is missing, or one that was given belongs to none.
    """
    left = list(given)
    lines = []
    choices = []
    for choice in request.loras:
        assert isinstance(choice, LoraChoice)
        digest = provenance.lora_hashes.get(choice.name)
        path = _replacement(choice.name, digest, left)
        if path is None and not _is_there(choice.name):
            path = _same_file(digest, [*folders, Path(choice.name).parent])
            if path is None:
                raise ProvenanceError(
                    f"the LoRA {choice.name} is missing. Give where it lies now with --lora."
                )
        if path is not None and path != choice.name:
            lines.append(f"{choice.name} is now {path}")
        choices.append(replace(choice, name=path or choice.name))
    if left:
        raise ProvenanceError(
            f"{left[0]} is none of the LoRAs of this picture: "
            f"{', '.join(str(choice) for choice in request.loras) or 'it has none'}."
        )
    return replace(request, loras=tuple(choices)), lines


def _is_there(name: str) -> bool:
    """Whether a LoRA is found by its name."""
    try:
        find_lora_file(name)
    except ModelError:
        return False
    return True


def _replacement(name: str, digest: str | None, given: list[str]) -> str | None:
    """Take what was given for a LoRA out of a list: the same file, or one of the same name."""
    for candidate in given:
        path = find_lora_file(candidate)
        same_name = path.stem == Path(name).stem
        if (digest is not None and _sha256_of(path) == digest) or same_name:
            given.remove(candidate)
            return candidate
    if len(given) == 1 and digest is None:
        return given.pop()
    return None


def _same_file(digest: str | None, folders: Sequence[Path]) -> str | None:
    """Return a file with this hash in one of the folders, None without one."""
    if digest is None:
        return None
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            if _sha256_of(path) == digest:
                return str(path)
    return None


def lora_hashes(request: Request) -> dict[str, str]:
    """Return the hashes of the files of a request's LoRAs, of those that are still there."""
    hashes = {}
    for choice in request.loras:
        assert isinstance(choice, LoraChoice)
        try:
            hashes[choice.name] = _sha256_of(find_lora_file(choice.name))
        except (ModelError, OSError):  # moved or deleted since it was loaded
            continue
    return hashes


def _sha256_of(path: Path) -> str:
    """Return the hash of a file, which is read once as long as it stays the same."""
    status = path.stat()
    return _read_hash(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=256)
def _read_hash(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
