"""Textual inversions (arXiv 2208.01618): vectors that stand in a prompt in the place of words.

For SDXL a file has vectors for both text encoders, `clip_l` and `clip_g`. diffusers' training
scripts write one file for each encoder, whose only key is the word; OneTrainer packs embeddings
into the LoRA that was trained with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from twostep.formats.header import Header, read_header
from twostep.formats.identify import kind_of
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import BUNDLED

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""The text encoders by the words that files have for their vectors."""

_SECOND = "_2"
"""How the name of the second of diffusers' two files ends (learned_embeds_2.safetensors)."""


class EmbeddingError(ModelError):
    """A textual inversion that is missing, a file that is none, or one for another model."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word for prompts, and its vectors [number, width] for each text encoder.

    Args:
        name: The word; in a prompt it may stand as "embedding:name", too.
        vectors: By "text_encoder" and "text_encoder_2"; as many for both.
        source: The file.
    """

    name: str
    vectors: Mapping[str, Tensor]
    source: Path

    def __post_init__(self) -> None:
        """Raise EmbeddingError unless there are as many vectors for both encoders."""
        shapes = {part: list(vectors.shape) for part, vectors in self.vectors.items()}
        if set(shapes) != set(ENCODERS.values()):
            present = ", ".join(shapes) or "none"
            raise EmbeddingError(
                f"{self.source} has vectors for {present} alone; SDXL needs them for both text "
                "encoders (clip_l and clip_g)."
            )
        numbers = {vectors.shape[0] for vectors in self.vectors.values() if vectors.dim() == 2}
        if len(numbers) != 1 or 0 in numbers or any(len(s) != 2 for s in shapes.values()):
            raise EmbeddingError(
                f"{self.source} has vectors of the shapes {shapes}; expected [number, width], and "
                "as many for both text encoders."
            )

    @property
    def count(self) -> int:
        """How many tokens the word takes in a prompt."""
        return next(iter(self.vectors.values())).shape[0]


def find_embeddings(places: Iterable[str | Path]) -> list[Embedding]:
    """Return the textual inversions in files and folders, in order.

    Raises EmbeddingError for what is missing, is none, or has a name twice.
    """
    found: dict[str, Embedding] = {}
    for place in places:
        for embedding in _in_place(Path(place)):
            if embedding.name in found:
                raise EmbeddingError(
                    f"{embedding.name} is in {found[embedding.name].source} and in "
                    f"{embedding.source}. Rename one of them."
                )
            found[embedding.name] = embedding
    return list(found.values())


def is_embedding(place: str | Path) -> bool:
    """Whether a file, or the first in a folder, is a textual inversion by its header."""
    path = Path(place)
    if path.is_dir():
        path = next(iter(sorted(path.glob("*.safetensors"))), path)
    if not path.is_file():
        return False
    shapes = read_header(path).shapes
    second = path.with_name(f"{path.stem}{_SECOND}.safetensors")
    return bool(set(shapes) & set(ENCODERS)) or (len(shapes) == 1 and second.is_file())


def bundled_embeddings(header: Header) -> list[Embedding]:
    """Return the textual inversions that OneTrainer packed into a LoRA; none in any other file."""
    keys = [key for key in header.shapes if key.startswith(BUNDLED)]
    if not keys:
        return []
    vectors: dict[str, dict[str, Tensor]] = {}
    with safe_open(header.path, "pt") as file:
        for key in keys:
            name, _, encoder = key.removeprefix(BUNDLED).rpartition(".")
            if encoder not in ENCODERS or not name:
                raise EmbeddingError(
                    f"{header.path} has {key}; expected {BUNDLED}NAME.clip_l and .clip_g."
                )
            vectors.setdefault(name, {})[ENCODERS[encoder]] = _in_rows(file.get_tensor(key))
    return [Embedding(name, parts, header.path) for name, parts in vectors.items()]


def _in_place(place: Path) -> list[Embedding]:
    """Return the textual inversions in a file, or in all files of a folder."""
    if place.is_dir():
        paths = sorted(place.glob("*.safetensors"))
        if not paths:
            raise EmbeddingError(f"{place} has no .safetensors in it. Pickles are not read.")
    elif place.is_file():
        paths = [place]
    else:
        raise EmbeddingError(f"{place} does not exist. Give a .safetensors, or a folder of them.")
    found = []
    for path in paths:
        header = read_header(path)
        if set(header.shapes) & set(ENCODERS):
            found.append(_both(header))
        elif not path.stem.endswith(_SECOND):
            found.append(_of_two_files(header))
    return found


def _both(header: Header) -> Embedding:
    """Read a file with vectors for both encoders."""
    unknown = sorted(set(header.shapes) - set(ENCODERS))
    if unknown:
        raise EmbeddingError(f"{header.path} has {unknown[0]} beside clip_l and clip_g.")
    with safe_open(header.path, "pt") as file:
        vectors = {ENCODERS[key]: _in_rows(file.get_tensor(key)) for key in header.shapes}
    return Embedding(header.path.stem, vectors, header.path)


def _of_two_files(header: Header) -> Embedding:
    """Read the two files that diffusers' scripts write: X.safetensors and X_2.safetensors."""
    second = header.path.with_name(f"{header.path.stem}{_SECOND}.safetensors")
    if len(header.shapes) != 1 or not second.is_file():
        kind = kind_of(header)
        raise EmbeddingError(
            f"{header.path} is {kind}, with {', '.join(list(header.shapes)[:3])}; expected a "
            f"textual inversion with clip_l and clip_g, or {second.name} beside it."
        )
    vectors = {}
    (word,) = header.shapes
    for part, path in zip(ENCODERS.values(), (header.path, second), strict=True):
        with safe_open(path, "pt") as file:
            if list(file.keys()) != [word]:
                raise EmbeddingError(f"{path} has {list(file.keys())}; expected {word} alone.")
            vectors[part] = _in_rows(file.get_tensor(word))
    return Embedding(word, vectors, header.path)


def _in_rows(vectors: Tensor) -> Tensor:
    """Return vectors as [number, width]; a single one may be stored as [width]."""
    return vectors[None] if vectors.dim() == 1 else vectors
