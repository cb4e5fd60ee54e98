"""Vector drawings of a set, which travel with the package and are rendered where they are needed.

A set of vector drawings is a folder like one of bitmaps (`pretrain.drawings`): `drawings.json`
names its concepts and styles, and one file per style holds its SVG documents, compressed. A
thousand things in four styles take 3.4 MB so, and a hundred as bitmaps of 256 pixels.
"""

import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from twostep.evaluate.attributes import Concept
from twostep.files import cache_folder, write_atomically
from twostep.pretrain.drawings import (
    LISTING,
    DrawingsError,
    DrawingSet,
    read_concepts,
    write_listing,
)
from twostep.pretrain.icons import ICON_SETS, load_icons, render, svg_of
from twostep.pretrain.kept import refusing_damage
from twostep.pretrain.progress import OnDone, untold
from twostep.training.cpu import num_cores

MINI = Path(__file__).with_name("art") / "mini"
"""The folder of the vector drawings that mini learns from: 991 things in 4 styles."""

_TENSOR = "drawings"

_FEW = 100
"""Fewer drawings are rendered before other processes have started."""


@dataclass(frozen=True)
class VectorSet:
    """SVG documents of concepts in several styles.

    Attributes:
        documents: of each style, those of all concepts in order.
        concepts: what is drawn.
        styles: words of the styles.
    """

    documents: Mapping[str, tuple[str, ...]]
    concepts: tuple[Concept, ...]

    @property
    def styles(self) -> tuple[str, ...]:
        """Words of the styles, in order."""
        return tuple(self.documents)

    @property
    def digest(self) -> str:
        """A digest of all documents and their order."""
        whole = hashlib.sha256()
        for style, documents in self.documents.items():
            whole.update("\0".join((style, *documents)).encode())
        return whole.hexdigest()


def collect_vectors(cache: Path, concepts: Sequence[Concept]) -> VectorSet:
    """Return the vector drawings of concepts from the icon sets of the four styles.

    Args:
        cache: folder of the fetched icon sets; npm is needed where one is missing.
        concepts: what is drawn.
    """
    documents = {}
    for style, package in ICON_SETS.items():
        icons = load_icons(cache, package)
        documents[style] = tuple(svg_of(icons, concept.icon) for concept in concepts)
    return VectorSet(documents, tuple(concepts))


def load_vectors(folder: Path = MINI) -> VectorSet:
    """Read a set of vector drawings; DrawingsError if it is missing or damaged."""
    if not (folder / LISTING).is_file():
        raise DrawingsError(
            f"There are no vector drawings in {folder}: it has no {LISTING}. "
            f"Fetch mini's with: twostep drawings --art mini --out {folder}"
        )
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        concepts = read_concepts(listing)
        documents = {}
        for style in listing["styles"]:
            by_icon = json.loads(lzma.decompress(_path(folder, style).read_bytes()))
            documents[style] = tuple(by_icon[concept.icon] for concept in concepts)
    except (OSError, KeyError, ValueError, TypeError, lzma.LZMAError) as error:
        raise DrawingsError(
            f"The vector drawings in {folder} are damaged ({error}). "
            f"Fetch them anew: twostep drawings --art mini --out {folder}"
        ) from error
    return VectorSet(documents, concepts)


def save_vectors(vectors: VectorSet, folder: Path) -> None:
    """Write a set of vector drawings to a folder; `load_vectors` reads it."""
    icons = [concept.icon for concept in vectors.concepts]
    for style, documents in vectors.documents.items():
        plain = json.dumps(dict(zip(icons, documents, strict=True)), ensure_ascii=False)
        with write_atomically(_path(folder, style)) as file:
            file.write(lzma.compress(plain.encode(), preset=9 | lzma.PRESET_EXTREME))
    write_listing(folder, vectors.concepts, vectors.styles)


def load_rendered(
    vectors: VectorSet,
    pixels: int,
    *,
    cache: Path | None = None,
    on_drawing: OnDone = untold,
) -> DrawingSet:
    """Return the drawings as bitmaps, rendered the first time and read from a file afterwards.

    Mini's 3,964 drawings of 256 pixels take a minute or two and 1.04 GB, which are mapped from the
    file and read as they are needed.

    Args:
        vectors: what to render.
        pixels: side of the bitmaps.
        cache: folder of the file; by default `drawings` in the folder of what can be made anew.
        on_drawing: called with the number of drawings that are done, and of all; not called where
            the file is there.

    Raises:
        DrawingsError: resvg is needed and not installed.
    """
    path = (cache or cache_folder() / "drawings") / f"{vectors.digest[:16]}-{pixels}.safetensors"
    if not path.is_file():
        rendered = render_vectors(vectors, pixels, on_drawing=on_drawing)
        with write_atomically(path) as file:
            file.write(save({_TENSOR: rendered.drawings}))
    with (
        refusing_damage(path, DrawingsError, "is damaged", "it is made anew"),
        safe_open(path, "pt") as opened,
    ):
        drawings = opened.get_tensor(_TENSOR)
    return DrawingSet(drawings, vectors.concepts, vectors.styles)


def render_vectors(
    vectors: VectorSet,
    pixels: int,
    *,
    workers: int | None = None,
    on_drawing: OnDone = untold,
) -> DrawingSet:
    """Render every drawing as a bitmap; DrawingsError if resvg is not installed.

    Args:
        vectors: what to render.
        pixels: side of the bitmaps.
        workers: processes that render at the same time, 1 for this one alone; by default one for
            every core if there is much to do. Resvg does not let threads of one process in.
        on_drawing: called with the number of drawings that are done, and of all.
    """
    documents = [document for style in vectors.documents.values() for document in style]
    if workers is None:
        workers = 1 if len(documents) < _FEW else num_cores()
    shape = (len(vectors.concepts), len(vectors.styles), 4, pixels, pixels)
    drawings = torch.empty(shape, dtype=torch.uint8)
    with ExitStack() as stack:
        rendered: Iterator[bytearray]
        if workers == 1:
            rendered = map(partial(_render_bytes, pixels=pixels), documents)
        else:
            # Fresh processes, for forking one whose libraries run threads can lock up.
            pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))
            rendered = pool.map(partial(_render_bytes, pixels=pixels), documents, chunksize=16)
        for number, levels in enumerate(rendered):
            style, concept = divmod(number, len(vectors.concepts))
            bitmap = torch.frombuffer(levels, dtype=torch.uint8)
            drawings[concept, style] = bitmap.view(4, pixels, pixels)
            on_drawing(number + 1, len(documents))
    return DrawingSet(drawings, vectors.concepts, vectors.styles)


def _render_bytes(document: str, pixels: int) -> bytearray:
    """Return the levels of a drawing: tensors would go from process to process by shared files."""
    return bytearray(render(document, pixels).numpy().tobytes())


def _path(folder: Path, style: str) -> Path:
    return folder / f"{style}.json.xz"
