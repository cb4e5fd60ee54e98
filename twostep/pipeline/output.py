"""Where pictures are written, and under which names; needs neither torch nor Pillow."""

import re
import tempfile
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from twostep.errors import TwostepError, reason_of
from twostep.files import write_new

_MAX_SLUG_LETTERS = 60
_MAX_SLUG_BYTES = 100


class OutputError(TwostepError):
    """A picture could not be written."""


def prepare_folder(folder: str | Path) -> Path:
    """Create a folder and prove that it can be written to, before work is spent.

    Raises `OutputError` where it cannot.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {reason_of(error)}. Choose a folder that you may write to."
        ) from error
    return folder


def stem_of(prompt: str, checkpoint: str, seed: int) -> str:
    """Return the name of an item's file, without number and ending.

    Args:
        prompt: what was drawn.
        checkpoint: the name in its contract.
        seed: of the item.
    """
    return f"{_slug(prompt)}_{_slug(checkpoint)}_{seed}"


def write_item(folder: Path, stem: str, data: bytes, suffix: str) -> Path:
    """Write the file of an item and return its path.

    The same item again keeps its file; a different one by the same name gets a number, so nothing
    is overwritten. Raises WriteError for a full disk.
    """
    return write_new(_free_paths(folder, stem, suffix), data)


def _free_paths(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """Yield the names that an item may get: the stem, then with numbers."""
    yield folder / f"{stem}{suffix}"
    for number in count(2):
        yield folder / f"{stem}_{number}{suffix}"


def _slug(text: str) -> str:
    """Return a text as a file name: lower-case letters and digits, hyphens between.

    Letters of every script stay. File systems count bytes, and allow 255 in the whole name.
    """
    normal = unicodedata.normalize("NFKC", text).lower()
    words = re.sub(r"[\W_]+", "-", normal).strip("-")[:_MAX_SLUG_LETTERS]
    cut = words.encode()[:_MAX_SLUG_BYTES].decode(errors="ignore")
    return cut.rstrip("-") or "untitled"
