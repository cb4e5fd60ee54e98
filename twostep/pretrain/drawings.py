"""Drawings of the same concepts in several styles, and pictures composed of them.

A set of drawings is a folder: `drawings.json` names its concepts and styles, and one sheet per
style holds their drawings, a lossless WebP file with a transparent background. The built-in set
travels with the package; `twostep drawings` renders it anew from the icon sets that NOTICE names.
The words of its concepts were chosen from emojibase's keywords.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

from twostep.errors import TwostepError
from twostep.evaluate.attributes import BACKGROUNDS, Concept
from twostep.files import write_atomically

BUILT_IN = Path(__file__).with_name("art") / "nano"
"""The folder of the drawings that the built-in models learn from: 115 concepts in 4 styles."""

DRAWING_PIXELS = 128
"""Side of a drawing as it is rendered."""

LISTING = "drawings.json"
"""The file that names the concepts and styles of a set."""

_SHEET_COLUMNS = 12


class DrawingsError(TwostepError):
    """A set of drawings could not be fetched, rendered, written or read."""


@dataclass(frozen=True, eq=False)
class DrawingSet:
    """RGBA drawings with transparent backgrounds: one per concept and style, in that order."""

    drawings: UInt8[Tensor, "concepts styles 4 height width"]
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]

    @property
    def subgroups(self) -> tuple[str, ...]:
        """The subgroups of the concepts, in order of first appearance."""
        return tuple(dict.fromkeys(concept.subgroup for concept in self.concepts))

    def first(self, concepts: int | None, styles: int | None) -> DrawingSet:
        """Return the first so many concepts in the first so many styles; None for all."""
        return DrawingSet(
            self.drawings[:concepts, :styles], self.concepts[:concepts], self.styles[:styles]
        )


def load_drawings(folder: Path = BUILT_IN) -> DrawingSet:
    """Read a set of drawings; DrawingsError if it is missing or damaged."""
    if not (folder / LISTING).is_file():
        raise DrawingsError(
            f"There are no drawings in {folder}: it has no {LISTING}. "
            f"Render them with: twostep drawings --out {folder}"
        )
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        concepts = read_concepts(listing)
        styles = tuple(listing["styles"])
        sheets = [
            _read_sheet(folder / f"{style}.webp", len(concepts), int(listing["pixels"]))
            for style in styles
        ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DrawingsError(
            f"The drawings in {folder} are damaged ({error}). "
            f"Delete the folder and render them anew: twostep drawings --out {folder}"
        ) from error
    return DrawingSet(torch.stack(sheets, dim=1), concepts, styles)


def save_drawings(drawings: DrawingSet, folder: Path) -> None:
    """Write a set of drawings to a folder, bit for bit; `load_drawings` reads it."""
    for column, style in enumerate(drawings.styles):
        with write_atomically(folder / f"{style}.webp") as file:
            # `exact` keeps the colours of transparent pixels, so what is read is what was written.
            _sheet(drawings.drawings[:, column]).save(
                file, "WEBP", lossless=True, exact=True, quality=100, method=6
            )
    pixels = drawings.drawings.shape[-1]
    # Last, for a folder without it is no set of drawings.
    write_listing(folder, drawings.concepts, drawings.styles, pixels=pixels)


def write_listing(
    folder: Path, concepts: Sequence[Concept], styles: Sequence[str], *, pixels: int | None = None
) -> None:
    """Write the listing of a set of drawings; vector drawings have no size in pixels."""
    listing: dict[str, Any] = {} if pixels is None else {"pixels": pixels}
    listing["styles"] = styles
    listing["concepts"] = {
        concept.icon: {"subgroup": concept.subgroup, "names": concept.names} for concept in concepts
    }
    with write_atomically(folder / LISTING) as file:
        file.write(json.dumps(listing, indent=1, ensure_ascii=False).encode())


def built_in_concepts(folder: Path = BUILT_IN) -> tuple[Concept, ...]:
    """Return the concepts that a built-in model knows, without loading their drawings."""
    return read_concepts(json.loads((folder / LISTING).read_text(encoding="utf-8")))


def read_concepts(listing: dict[str, Any]) -> tuple[Concept, ...]:
    """Return the concepts of a listing, in order."""
    return tuple(
        Concept(icon, entry["subgroup"], tuple(entry["names"]))
        for icon, entry in listing["concepts"].items()
    )


def _sheet(drawings: UInt8[Tensor, "concepts 4 height width"]) -> Image.Image:
    """Lay the drawings of one style out in rows."""
    num_drawings, _, height, width = drawings.shape
    num_rows = math.ceil(num_drawings / _SHEET_COLUMNS)
    sheet = np.zeros((num_rows * height, _SHEET_COLUMNS * width, 4), dtype=np.uint8)
    for number, drawing in enumerate(drawings.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, _SHEET_COLUMNS)
        top = row * height
        left = column * width
        sheet[top : top + height, left : left + width] = drawing
    return Image.fromarray(sheet)


def _read_sheet(path: Path, count: int, pixels: int) -> UInt8[Tensor, "concepts 4 height width"]:
    """Read `count` drawings from a sheet; ValueError if it is too small for them."""
    with Image.open(path) as image:
        sheet = torch.from_numpy(np.array(image.convert("RGBA")))
    num_rows = math.ceil(count / _SHEET_COLUMNS)
    expected = (num_rows * pixels, _SHEET_COLUMNS * pixels, 4)
    if tuple(sheet.shape) != expected:
        raise ValueError(f"{path.name} is {list(sheet.shape)}, expected {list(expected)}")
    cells = sheet.reshape(num_rows, pixels, _SHEET_COLUMNS, pixels, 4).permute(0, 2, 4, 1, 3)
    return cells.flatten(0, 1)[:count].contiguous()


@dataclass(frozen=True)
class Placement:
    """How far a drawing may stray from upright and centred when it is put on a picture.

    Attributes:
        flip: whether half of them are mirrored.
        smallest_scale: side of the smallest drawing, as a share of the picture's.
        largest_scale: side of the largest.
        shift_pixels: how far it is moved at most, each way, in pixels of a picture.
        rotation_degrees: how far it is turned at most, each way.
    """

    flip: bool = True
    smallest_scale: float = 0.8
    largest_scale: float = 0.94
    shift_pixels: float = 3.0
    rotation_degrees: float = 6.0


def compose(
    drawings: UInt8[Tensor, "batch 4 height width"],
    background: Int[Tensor, " batch"],
    placement: Placement,
    generator: torch.Generator,
    *,
    pixels: int,
) -> Float[Tensor, "batch 3 pixels pixels"]:
    """Put drawings on plain backgrounds at random places; return pictures in -1..1.

    Args:
        drawings: RGBA, 0..255.
        background: numbers of BACKGROUNDS.
        placement: how far drawings stray.
        generator: draws the places.
        pixels: side of the pictures.
    """
    return lay_on(place_drawings(drawings, placement, generator, pixels=pixels), background)


def lay_on(
    placed: Float[Tensor, "batch 4 height width"], background: Int[Tensor, " batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """Put what `place_drawings` returned on plain backgrounds; return pictures in -1..1."""
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    colours = colours.to(placed.device)
    picture = placed[:, :3] + (1 - placed[:, 3:]) * colours[background][:, :, None, None]
    return picture * 2 - 1


def place_drawings(
    drawings: UInt8[Tensor, "batch 4 height width"],
    placement: Placement,
    generator: torch.Generator,
    *,
    pixels: int,
) -> Float[Tensor, "batch 4 pixels pixels"]:
    """Put drawings at random places on transparent pictures.

    Returns:
        RGBA in 0..1, colours premultiplied with the opacity that follows them.
    """
    count = len(drawings)
    canvas = 2 * pixels  # drawn at twice the size and averaged down, so edges stay clean
    theta = _random_transforms(count, placement, pixels, generator)
    grid = functional.affine_grid(theta, [count, 4, canvas, canvas], align_corners=False)
    rgba = drawings.float() / 255
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    placed = functional.grid_sample(premultiplied, grid, align_corners=False)
    return functional.avg_pool2d(placed, 2)


def _random_transforms(
    count: int, placement: Placement, pixels: int, generator: torch.Generator
) -> Float[Tensor, "batch 2 3"]:
    """Draw affine maps from a picture's coordinates to a drawing's, both in -1..1."""
    flip, size, angle, shift_x, shift_y = torch.rand(5, count, generator=generator)
    mirror = torch.ones(count)
    if placement.flip:
        mirror = torch.where(flip < 0.5, -1.0, 1.0)
    scale = placement.smallest_scale + size * (placement.largest_scale - placement.smallest_scale)
    radians = (2 * angle - 1) * math.radians(placement.rotation_degrees)
    cosine = torch.cos(radians) / scale
    sine = torch.sin(radians) / scale
    rotation = torch.stack(
        [torch.stack([mirror * cosine, -mirror * sine]), torch.stack([sine, cosine])]
    )
    rotation = rotation.permute(2, 0, 1)
    reach = 2 * placement.shift_pixels / pixels
    shift = torch.stack([(2 * shift_x - 1) * reach, (2 * shift_y - 1) * reach], dim=1)
    return torch.cat([rotation, -(rotation @ shift[:, :, None])], dim=2)


def random_backgrounds(
    count: int, generator: torch.Generator, *, among: int = len(BACKGROUNDS)
) -> Int[Tensor, " count"]:
    """Draw numbers of BACKGROUNDS, of all or of the first so many."""
    return torch.randint(among, (count,), generator=generator)


def listed_names(concepts: Sequence[Concept]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Return names and subgroup of every concept: what captions of it are written from."""
    return tuple((concept.names, concept.subgroup) for concept in concepts)
