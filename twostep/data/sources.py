"""A user's own pictures: found with their captions, read, and filtered.

A source is a folder with `x.txt` beside `x.png`, a .jsonl file, webdataset shards (.tar), or a
Hugging Face dataset. Nothing is read before its turn, and every picture that cannot be used is
reported by name with the reason. Latents are unknown here.
"""

import glob
import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from twostep.errors import TwostepError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_KEYS = ("image", "file_name", "path", "file", "jpg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "prompt")
HUB = "hf:"
MIN_SIDE, MAX_PIXELS = 8, 2**26


class DataError(TwostepError):
    """A source without pictures, or one that is not what it says."""


class UnusablePictureError(TwostepError):
    """One picture that cannot be used; its message is the reason."""


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
    picture = opened(entry.read)
    if min(picture.size) < demands.min_side:
        raise UnusablePictureError(
            f"it is {picture.width}x{picture.height}, smaller than {demands.min_side} px"
        )
    if demands.min_sharpness > 0 and (found := sharpness(picture)) < demands.min_sharpness:
        raise UnusablePictureError(f"its sharpness is {found:.4f}, below {demands.min_sharpness:g}")
    return picture


def opened(read: Callable[[], bytes | Image.Image], *, for_input: bool = False) -> Image.Image:
    """Return a picture in RGB, upright and on white; UnusablePictureError if it cannot be read.

    One that a drawing is made of may be neither tiny nor so large that it fills the memory.
    """
    try:
        data = read()
        picture = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        width, height = picture.size
        if for_input and not (min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS):
            raise UnusablePictureError(
                f"it is {width}x{height}; expected {MIN_SIDE}x{MIN_SIDE} to {MAX_PIXELS:,} pixels in all"
            )
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusablePictureError(f"it cannot be read ({error})") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def sharpness(picture: Image.Image) -> float:
    """Return the standard deviation of the Laplacian of its brightness (0..1) at a size of about
    512 px.
    """
    scale = 512 / max(picture.size)
    if scale < 1:
        size = (max(3, round(picture.width * scale)), max(3, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    grey = np.pad(np.asarray(picture.convert("L"), dtype=np.float32) / 255, 1, mode="edge")
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * grey[1:-1, 1:-1]).std())


def nearest_size(picture: Image.Image, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (width, height) that is nearest to a picture in shape."""
    shape = math.log(picture.width / picture.height)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))


def cut(
    picture: Image.Image, sizes: Sequence[tuple[int, int]]
) -> tuple[Float[Tensor, "3 height width"], tuple[int, int, int, int, int, int]]:
    """Scale a picture to cover the size nearest in shape and cut out its middle.

    Returns pixels in -1..1 and SDXL's micro-conditioning: original (h, w), crop (top, left), target
    (h, w), all in px.
    """
    width, height = nearest_size(picture, sizes)
    covering = ImageOps.cover(picture, (width, height), Image.Resampling.LANCZOS)
    left, top = (covering.width - width) // 2, (covering.height - height) // 2
    middle = covering.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels, (picture.height, picture.width, top, left, height, width)


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
