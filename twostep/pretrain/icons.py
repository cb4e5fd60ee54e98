"""The drawings that everything here learns from: four icon sets from npm, rendered.

Sources (by name): fluent-emoji-flat and fluent-emoji (MIT), noto (Apache-2.0), twemoji (CC-BY-4.0);
see NOTICE.
"""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from twostep.evaluate.attributes import Concept
from twostep.pretrain.drawings import DRAWING_PIXELS, EmojiError, EmojiSet

ICON_SETS = {
    "flat": "fluent-emoji-flat",
    "3d": "fluent-emoji",
    "noto": "noto",
    "twemoji": "twemoji",
}
"""Word of each drawing style -> the icon set it comes from."""


def build_emoji(
    cache: Path, concepts: Sequence[Concept], *, on_drawing: Callable[[int, int], None]
) -> EmojiSet:
    """Fetch the four icon sets into `cache` (npm needed, once) and render every concept in every
    style.
    """
    icon_sets = [_load_icons(cache, package) for package in ICON_SETS.values()]
    drawings = torch.empty(
        len(concepts), len(icon_sets), 4, DRAWING_PIXELS, DRAWING_PIXELS, dtype=torch.uint8
    )
    for row, concept in enumerate(concepts):
        for column, icons in enumerate(icon_sets):
            drawings[row, column] = render(_svg(icons, concept.icon))
            on_drawing(row * len(icon_sets) + column + 1, len(concepts) * len(icon_sets))
    return EmojiSet(drawings, tuple(concepts), tuple(ICON_SETS))


def fetch_icons(cache: Path, package: str) -> Path:
    """Return the archive of an icon set, fetched into `cache` where it is not there yet."""
    archive = cache / f"{package}.tgz"
    if not archive.exists():
        _fetch(f"@iconify-json/{package}", archive)
    return archive


def _load_icons(cache: Path, package: str) -> dict[str, object]:
    archive = fetch_icons(cache, package)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise EmojiError(f"{archive} holds no icons.json; delete it and try again.")
        icons: dict[str, object] = json.load(member)
    return icons


def _fetch(package: str, archive: Path) -> None:
    if shutil.which("npm") is None:
        raise EmojiError(f"npm is needed once, to fetch {package}; install Node.js and try again.")
    archive.parent.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", package, "--silent"], cwd=archive.parent, capture_output=True, text=True
    )
    if packed.returncode != 0:
        raise EmojiError(
            f"npm could not fetch {package}: {packed.stderr.strip() or 'no reason given'}"
        )
    (archive.parent / packed.stdout.strip().splitlines()[-1]).rename(archive)


def _svg(icons: dict[str, object], icon: str) -> str:
    entry = icons["icons"].get(icon)  # type: ignore[attr-defined]
    if entry is None:
        raise EmojiError(
            f"The icon set '{icons['prefix']}' has no '{icon}'; leave this concept out."
        )
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{entry["body"]}</svg>'


def render(svg: str) -> UInt8[Tensor, "4 height width"]:
    """Draw a vector drawing on a square, RGBA with a transparent background."""
    import resvg_py  # an extra: only who renders the drawings anew needs it

    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_PIXELS, height=DRAWING_PIXELS)
    drawing = Image.open(BytesIO(bytes(png))).convert("RGBA")
    square = Image.new("RGBA", (DRAWING_PIXELS, DRAWING_PIXELS))
    square.paste(
        drawing, ((DRAWING_PIXELS - drawing.width) // 2, (DRAWING_PIXELS - drawing.height) // 2)
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
