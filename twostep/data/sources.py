"""A user's own pictures: found with their captions, read, and filtered.

A source is a folder with `x.txt` beside `x.png`, a .jsonl file, webdataset shards (.tar), or a
Hugging Face dataset. Nothing is read before its turn, and every picture that cannot be used is
reported by name with the reason. Latents are unknown here.
"""

import glob
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from twostep.errors import TwostepError
from twostep.media.pictures import UnusablePictureError, open_picture, sharpness

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_KEYS = ("image", "file_name", "path", "file", "jpg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "prompt")
HUB = "hf:"


class DataError(TwostepError):
    """A source without pictures, or one that is not what it says."""


@dataclass(frozen=True)
class Entry:
    """A picture of a source.

    Attributes:
        name: in the source; the same in every run.
        caption: None if it has none.
        read: returns the bytes of its file, or the picture itself.
    """

    name: str
    caption: str | None
    read: Callable[[], bytes | Image.Image]


@dataclass(frozen=True)
class Demands:
    """What a picture must be to be used: large and sharp, as in section 3.6 of arXiv 2402.13929.

    Attributes:
        min_side: of its width and height, in pixels.
        min_sharpness: as of `sharpness`; 0 asks for nothing.
    """

    min_side: int = 0
    min_sharpness: float = 0.0


def find_entries(source: str) -> Iterator[Entry]:
    """Yield the pictures of a source in a fixed order, each to be read in its turn.

    Args:
        source: a folder with `x.txt` beside `x.png`, a .jsonl file, a pattern of .tar shards, or
            `hf:name` of a Hugging Face dataset.

    Raises:
        DataError: the source is missing, empty, damaged or of no known kind.
    """
    if source.startswith(HUB):
        entries = _from_hub(source.removeprefix(HUB))
    elif source.endswith(".tar"):
        entries = _from_shards(sorted(glob.glob(source)), source)
    elif source.endswith(".jsonl"):
        entries = _from_lines(Path(source))
    else:
        entries = _from_folder(Path(source))
    first = next(entries, None)
    if first is None:
        raise DataError(f"{source} holds no pictures; known endings are {' '.join(ENDINGS)}.")
    yield first
    yield from entries


def read_picture(entry: Entry, demands: Demands) -> Image.Image:
    """Return the picture in RGB, upright and on white; UnusablePictureError with the reason if it
    cannot be used.
    """
    if entry.caption is None or not entry.caption.strip():
        raise UnusablePictureError("it has no caption")
    picture = open_picture(entry.read)
    if min(picture.size) < demands.min_side:
        raise UnusablePictureError(
            f"it is {picture.width}x{picture.height}, smaller than {demands.min_side} px"
        )
    if demands.min_sharpness > 0 and (found := sharpness(picture)) < demands.min_sharpness:
        raise UnusablePictureError(f"its sharpness is {found:.4f}, below {demands.min_sharpness:g}")
    return picture


def _from_folder(folder: Path) -> Iterator[Entry]:
    """Read `x.txt` beside `x.png`, in subfolders too, or what a metadata.jsonl lists."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder, .jsonl file, .tar shard or {HUB}name of a dataset."
        )
    if (folder / "metadata.jsonl").is_file():
        yield from _from_lines(folder / "metadata.jsonl")
        return
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS):
        beside = path.with_suffix(".txt")
        caption = beside.read_text(encoding="utf-8").strip() if beside.is_file() else None
        yield Entry(str(path.relative_to(folder)), caption, path.read_bytes)


def _from_lines(file: Path) -> Iterator[Entry]:
    """Read a JSON object per line: a picture, its path relative to the file, and a caption."""
    if not file.is_file():
        raise DataError(f"{file} does not exist.")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            image = _value(values, IMAGE_KEYS)
        except (json.JSONDecodeError, AttributeError, KeyError) as error:
            raise DataError(
                f"{file}, line {number}: {error}. Every line is a JSON object such as "
                '{"image": "a.png", "caption": "a fox"}; '
                f"names for the picture: {', '.join(IMAGE_KEYS)}."
            ) from error
        yield Entry(str(image), _caption(values), (file.parent / str(image)).read_bytes)


def _from_shards(paths: list[str], source: str) -> Iterator[Entry]:
    """Read the webdataset shards that a pattern matched."""
    if not paths:
        raise DataError(f"{source} does not exist.")
    for path in paths:
        try:
            with tarfile.open(path) as tar:
                yield from _from_shard(tar, Path(path).name)
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is no whole tar file ({error}). Fetch it again, or leave it out."
            ) from error


def _from_shard(tar: tarfile.TarFile, shard: str) -> Iterator[Entry]:
    """Group a webdataset shard's members by their stem: x.jpg with x.txt or x.json."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar.getmembers():
        stem, _, ending = member.name.partition(".")
        groups.setdefault(stem, {})[f".{ending.lower()}"] = member
    for stem, members in groups.items():
        image = next((member for ending, member in members.items() if ending in ENDINGS), None)
        if image is None:
            continue
        yield _entry(f"{shard}/{stem}", _shard_caption(tar, members), _content(tar, image))


def _shard_caption(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | None:
    """Return the caption of a group of members, by their endings; None if there is none."""
    if ".txt" in members:
        return _content(tar, members[".txt"]).decode(errors="replace")
    if ".json" in members:
        return _caption(json.loads(_content(tar, members[".json"])))
    return None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _from_hub(name: str) -> Iterator[Entry]:
    """Read a dataset by name or folder, "name" or "name:split", with the `datasets` library."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("Hugging Face datasets need `pip install twostep[datasets]`.") from error
    name, _, split = name.partition(":")
    for number, row in enumerate(load_dataset(name, split=split or "train")):
        try:
            image = _value(row, IMAGE_KEYS)
        except KeyError as error:
            raise DataError(
                f"{name} has the columns {', '.join(row)}; expected one of {IMAGE_KEYS}."
            ) from error
        yield _entry(f"{name}/{number}", _caption(row), image)


def _entry(name: str, caption: str | None, picture: bytes | Image.Image) -> Entry:
    """Return the entry of a picture that has been read already."""
    return Entry(name, caption, lambda: picture)


def _value(values: dict[str, Any], keys: Sequence[str]) -> Any:
    """Return the value of the first of the keys that there is; KeyError if there is none."""
    for key in keys:
        if key in values:
            return values[key]
    raise KeyError(f"none of {', '.join(keys)} in {', '.join(values)}")


def _caption(values: dict[str, Any]) -> str | None:
    """Return the first caption that is not empty; None if there is none."""
    return next((str(values[key]) for key in CAPTION_KEYS if values.get(key)), None)
