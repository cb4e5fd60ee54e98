"""What a .safetensors file is, told by its header alone: names, shapes and metadata, never a
weight.

A file of many gigabytes is told in milliseconds. The knowledge stands in kinds.toml, other
architectures too, so that the answer to them is a clear no. How a model is put together is unknown
here.
"""

import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostep.formats.locate import ModelError

_KNOWN: dict[str, dict[str, str]] = tomllib.loads(
    Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
_SMALLER = "SDXL's classes, in another size"
DOWN = r"(lora_down|lora_A|lora(_linear_layer)?\.down)\.weight"
_MAX_HEADER_BYTES = 100_000_000  # as in the format's own library


@dataclass(frozen=True)
class Header:
    """A file's names, sorted, with their shapes and precisions, and its metadata; the file is all
    there.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    precisions: dict[str, str]
    metadata: dict[str, str]

    def shape(self, pattern: str) -> tuple[int, ...]:
        """Return the shape of the first weight whose name ends so, () if none does."""
        return next(
            (shape for key, shape in self.shapes.items() if re.search(rf"{pattern}$", key)), ()
        )


@dataclass(frozen=True)
class Kind:
    """What a file is: "a LoRA", for which architecture, and by whose names."""

    what: str
    architecture: str | None
    names: str | None

    def __str__(self) -> str:
        """Say it: "a LoRA for Flux"."""
        return self.what if self.architecture is None else f"{self.what} for {self.architecture}"

    @property
    def readers(self) -> str:
        """Who loads such a file."""
        if self.architecture is not None and not self.architecture.startswith("SDXL"):
            return "not twostep, which knows SDXL alone"
        if self.architecture == _SMALLER:
            return "twostep, diffusers; others know the full size alone"
        return _KNOWN["readers"].get(
            (self.names or "") if self.what == "a LoRA" else self.what, "not twostep"
        )


def read_header(path: Path) -> Header:
    """Read a file's header; ModelError for pickles, for what is empty, cut off, or no such file at
    all.
    """
    start = b""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"{size} bytes cannot have a header of {length}")
            told: dict[str, Any] = json.loads(file.read(length))
        metadata = told.pop("__metadata__", {})
        whole = 8 + length + max((value["data_offsets"][1] for value in told.values()), default=0)
        if whole != size:
            raise ValueError(f"it has {size} of {whole} bytes")
        shapes = {key: tuple(told[key]["shape"]) for key in sorted(told)}
        return Header(path, shapes, {key: told[key]["dtype"] for key in shapes}, metadata)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        none = f"is no whole safetensors file ({error}). Fetch or export it again."
        empty = "is empty. Fetch or export it again." if start == b"" and path.is_file() else none
        raise ModelError(
            f"{path} {_first('start', start.decode('latin-1'), re.match) or empty}"
        ) from error


def kind_of(header: Header) -> Kind:
    """Tell what a file is by its names and shapes."""
    names = "".join(f"{key}\n" for key in header.shapes)
    what = _first("what", names) or (
        "no model that is known here" if names else "a file without any weights"
    )
    architecture = _first("architecture", names) or _by_shapes(header) or _first("otherwise", names)
    return Kind(what, architecture, _first("names", names))


def summary(header: Header) -> dict[str, str]:
    """Say of a file what one would ask; what cannot be said is left out."""
    kind = kind_of(header)
    ranks = {shape[0] for key, shape in header.shapes.items() if re.search(DOWN, key) and shape}
    sizes = [math.prod(shape) for shape in header.shapes.values()]
    alphas = (
        sum(key.endswith(".alpha") for key in header.shapes)
        or "lora_adapter_metadata" in header.metadata
    )
    predicts = (
        "v" if "v_pred" in header.shapes else header.metadata.get("modelspec.prediction_type")
    )
    precisions = ", ".join(sorted({*header.precisions.values()}))
    told = {
        "is": str(kind),
        "names": kind.names,
        "rank": ranks and ", ".join(map(str, sorted(ranks))),
        "alpha": ranks
        and ("in the file" if alphas else "not in the file: the rank, or the contract's"),
        "weights": f"{len(sizes):,} tensors, {sum(sizes):,} numbers, {precisions}",
        "predicts": re.search("UNet|checkpoint", kind.what) and predicts,
        "title": header.metadata.get("modelspec.title"),
        "read by": kind.readers,
    }
    return {name: str(value) for name, value in told.items() if value}


def _by_shapes(header: Header) -> str | None:
    context = header.shape(rf"attn2[._]to_k(\.weight|[._]{DOWN})")
    if not context:
        return None
    channels = header.shape(r"(input_blocks\.0\.0|(^|\.)conv_in)\.weight") or (0, 4)
    return _KNOWN["context"].get(str(context[1]), _SMALLER) + _KNOWN["channels"].get(
        str(channels[1]), ""
    )


def _first(table: str, text: str, search: Any = re.search) -> str | None:
    return next(
        (said for pattern, said in _KNOWN[table].items() if search(pattern, text, re.MULTILINE)),
        None,
    )
