"""The header of a .safetensors file: the names, shapes and precisions of its tensors, and its
metadata.

A header is read once, by `checkpoint.resolve`, and then passed on. It takes milliseconds, however
large the file is.
"""

import json
import math
import re
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from twostep.formats.locate import ModelError

_STARTS: dict[str, str] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)["start"]
"""Explanations of files that are no safetensors, by a pattern of how they begin."""

_MAX_HEADER_BYTES = 100_000_000  # as in the format's own library

_FIELDS = {"dtype", "shape", "data_offsets"}
"""What a header says of a tensor."""

_BITS = {
    "F4": 4,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""The bits of one number of each precision that the format has."""

_NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d", "I32": "<i", "I64": "<q"}
"""How `struct` reads one number of each precision that alphas come in; see also BF16 below."""

_MAX_NUMBER_BYTES = 8

_LEVELS = "edm_vpred."
"""How the names of noise levels begin."""


@dataclass(frozen=True, eq=False)
class Header:
    """What the header of a .safetensors file says; the file has been found complete.

    `shapes` and `precisions` (as "F16") are by the sorted names of the tensors. `alpha` is the
    first number whose name ends with `.alpha`, which LoRAs have, and `levels` are the numbers whose
    names begin with `edm_vpred.`, by which a model says its noise levels; they are read together
    with the header, so that the file is not opened again for them.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    precisions: dict[str, str]
    metadata: dict[str, str]
    alpha: float | None = None
    levels: Mapping[str, float] = field(default_factory=dict)

    def shape(self, pattern: str) -> tuple[int, ...]:
        """Return the shape of the first tensor whose name ends with a pattern, () without one."""
        for name, shape in self.shapes.items():
            if re.search(rf"{pattern}$", name):
                return shape
        return ()

    def has(self, prefix: str) -> bool:
        """Tell whether the name of any tensor starts with a prefix."""
        return any(name.startswith(prefix) for name in self.shapes)


def read_header(path: Path) -> Header:
    """Read the header of a file, and check that the file is complete.

    As long as the file stays as it is, whoever asks again gets the same header without reading.

    Raises ModelError for pickles and for whatever else is no safetensors file, is empty, is cut
    off, or does not exist.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"{path} {_explanation(path, b'', error)}") from error
    return _read_header(path, status.st_size, (status.st_ino, status.st_mtime_ns))


@lru_cache(maxsize=64)
def _read_header(path: Path, size: int, version: tuple[int, int]) -> Header:
    """Read the header of a file of so many bytes; `version` differs when it was written anew."""
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = _header_length(start, size)
            tensors, metadata = _parsed(file.read(length))
            _check_tensors(tensors)
            _check_size(tensors, start=8 + length, size=size)
            alpha = _first_alpha(file, tensors, start=8 + length)
            levels = _levels(file, tensors, start=8 + length)
        names = sorted(tensors)
        shapes = {name: tuple(tensors[name]["shape"]) for name in names}
        precisions = {name: tensors[name]["dtype"] for name in names}
    except (
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError(f"{path} {_explanation(path, start, error)}") from error
    return Header(
        path=path,
        shapes=shapes,
        precisions=precisions,
        metadata=metadata,
        alpha=alpha,
        levels=levels,
    )


def _header_length(start: bytes, size: int) -> int:
    """Return how many bytes the header has; the first eight bytes of the file say it."""
    length = int.from_bytes(start, "little")
    if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"{size} bytes cannot have a header of {length}")
    return length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; raises ValueError for a key that is there twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name is there twice")
    return values


def _checked_metadata(metadata: object) -> dict[str, str]:
    """Return metadata, which are text by text; raises ValueError for anything else."""
    if metadata is None:
        return {}
    is_text = isinstance(metadata, dict) and all(
        isinstance(each, str) for each in metadata.values()
    )
    if not is_text:
        raise ValueError(f"its metadata are {str(metadata)[:60]}, not text by name")
    assert isinstance(metadata, dict)
    return metadata


def _parsed(text: bytes) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return what a header says of each tensor, and the metadata; raises ValueError."""
    tensors = json.loads(text, object_pairs_hook=_once)
    if not isinstance(tensors, dict):
        raise ValueError("its header is no JSON object")
    metadata = _checked_metadata(tensors.pop("__metadata__", None))
    for name, tensor in tensors.items():
        if not isinstance(tensor, dict):
            raise ValueError(f"{name} is described by {str(tensor)[:80]}")
    return tensors, metadata


def _check_tensors(tensors: dict[str, Any]) -> None:
    """Raise ValueError unless every tensor is as long as its shape says, one after the other."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tensor["shape"]
        offsets = tensor["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, *offsets))
        bits = _BITS.get(tensor["dtype"])
        if not whole or len(offsets) != 2 or bits is None or set(tensor) - _FIELDS:
            raise ValueError(f"{name} is described by {str(tensor)[:80]}")
        length = offsets[1] - offsets[0]
        if offsets[0] != end or length * 8 != math.prod(shape) * bits:
            raise ValueError(f"{name} of {shape} lies at {offsets}")
        end = offsets[1]


def _check_size(tensors: dict[str, Any], *, start: int, size: int) -> None:
    """Raise ValueError unless the file ends where its last tensor ends."""
    complete = start + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    if complete != size:
        raise ValueError(f"it has {size} of {complete} bytes")


def _first_alpha(file: BinaryIO, tensors: dict[str, Any], *, start: int) -> float | None:
    """Read the first single number called `.alpha`, None if there is none."""
    name = min((name for name in tensors if name.endswith(".alpha")), default=None)
    if name is None:
        return None
    return _number(file, tensors[name], start=start)


def _levels(file: BinaryIO, tensors: dict[str, Any], *, start: int) -> dict[str, float]:
    """Read the numbers by which a model says its noise levels."""
    levels = {}
    for name in sorted(tensors):
        if name.startswith(_LEVELS):
            number = _number(file, tensors[name], start=start)
            if number is not None:
                levels[name] = number
    return levels


def _number(file: BinaryIO, tensor: dict[str, Any], *, start: int) -> float | None:
    """Read a tensor of one number, None for any other."""
    begin, end = tensor["data_offsets"]
    if end - begin > _MAX_NUMBER_BYTES:
        return None
    file.seek(start + begin)
    data = file.read(end - begin)
    precision = tensor["dtype"]
    if precision == "BF16":  # the upper half of a float32
        data = b"\x00\x00" + data
        precision = "F32"
    form = _NUMBERS.get(precision)
    if form is None or len(data) != struct.calcsize(form):
        return None
    (number,) = struct.unpack(form, data)
    return float(number)


def _explanation(path: Path, start: bytes, error: Exception) -> str:
    """Say what a file is that has no readable header."""
    text = start.decode("latin-1")
    for pattern, explanation in _STARTS.items():
        if re.match(pattern, text):
            return explanation
    if start == b"" and path.is_file():
        return "is empty. Fetch or export it again."
    return f"is no whole safetensors file ({error}). Fetch or export it again."
