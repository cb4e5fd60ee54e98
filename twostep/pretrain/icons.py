"""Drawings rendered from icon sets, which are fetched from npm once.

Sources (by name): fluent-emoji-flat and fluent-emoji (MIT), noto (Apache-2.0), twemoji (CC-BY-4.0);
see NOTICE. Only who fetches them anew needs npm; resvg, from twostep's extra `art`, renders them.
"""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from twostep.evaluate.attributes import Concept
from twostep.pretrain.drawings import DRAWING_PIXELS, DrawingsError, DrawingSet
from twostep.pretrain.progress import OnDone

ICON_SETS = {
    "flat": "fluent-emoji-flat",
    "3d": "fluent-emoji",
    "noto": "noto",
    "twemoji": "twemoji",
}
"""Word of each drawing style -> the icon set it comes from."""


def render_built_in(cache: Path, concepts: Sequence[Concept], *, on_drawing: OnDone) -> DrawingSet:
    """Render every concept in every style of the built-in set.

    Args:
        cache: folder of the fetched icon sets; npm is needed where one is missing.
        concepts: what to draw.
        on_drawing: called with the number of drawings that are done, and of all.
    """
    icon_sets = [load_icons(cache, package) for package in ICON_SETS.values()]
    num_drawings = len(concepts) * len(icon_sets)
    drawings = []
    for concept in concepts:
        for icons in icon_sets:
            drawings.append(render(svg_of(icons, concept.icon)))
            on_drawing(len(drawings), num_drawings)
    stacked = torch.stack(drawings).unflatten(0, (len(concepts), len(icon_sets)))
    return DrawingSet(stacked, tuple(concepts), tuple(ICON_SETS))


def fetch_icons(cache: Path, package: str) -> Path:
    """Return the archive of an icon set, fetched into `cache` if it is not there yet."""
    archive = cache / f"{package}.tgz"
    if not archive.exists():
        _fetch(f"@iconify-json/{package}", archive)
    return archive


def render(svg: str, pixels: int = DRAWING_PIXELS) -> UInt8[Tensor, "4 height width"]:
    """Draw a vector drawing in the middle of a square, RGBA with a transparent background."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise DrawingsError("Drawings are rendered by resvg: pip install 'twostep[art]'") from error

    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=pixels,
        height=pixels,
        skip_system_fonts=True,  # the drawings have no text
    )
    drawing = Image.open(BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (pixels, pixels))
    left = (pixels - drawing.width) // 2
    top = (pixels - drawing.height) // 2
    square.paste(drawing, (left, top))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def read_member(archive: Path, name: str) -> Any:
    """Read a JSON file of an icon set's archive."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/{name}")
        if member is None:
            raise DrawingsError(f"{archive} holds no {name}; delete it and try again.")
        return json.load(member)


def load_icons(cache: Path, package: str) -> dict[str, Any]:
    """Return the icons of a set as Iconify lists them, fetched into `cache` if need be."""
    icons: dict[str, Any] = read_member(fetch_icons(cache, package), "icons.json")
    return icons


def _fetch(package: str, archive: Path) -> None:
    if shutil.which("npm") is None:
        raise DrawingsError(
            f"npm is needed once, to fetch {package}; install Node.js and try again."
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", package, "--silent"], cwd=archive.parent, capture_output=True, text=True
    )
    if packed.returncode != 0:
        reason = packed.stderr.strip() or "no reason given"
        raise DrawingsError(f"npm could not fetch {package}: {reason}")
    (archive.parent / packed.stdout.strip().splitlines()[-1]).rename(archive)


def svg_of(icons: dict[str, Any], icon: str) -> str:
    """Return the vector drawing of an icon."""
    entry = icons["icons"].get(icon)
    if entry is None:
        raise DrawingsError(
            f"The icon set '{icons['prefix']}' has no '{icon}'; leave this concept out."
        )
    width = entry.get("width", icons.get("width", 16))
    height = entry.get("height", icons.get("height", 16))
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    return f"<svg {frame}>{entry['body']}</svg>"
