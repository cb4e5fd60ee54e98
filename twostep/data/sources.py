"""A user's own pictures: found with their captions, read, and filtered.

A source is a folder with `x.txt` beside `x.png`, a table (.jsonl, .csv), webdataset shards (.tar),
or a Hugging Face dataset. Nothing is read before its turn, and everything that cannot be used is
reported by name with the reason. Latents are unknown here.
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from twostep.data.texts import (
    UnreadableTextError,
    captions_of,
    decode,
    is_missing,
    read_rows,
)
from twostep.errors import TwostepError
from twostep.media.pictures import UnusablePictureError, open_picture, sharpness

ENDINGS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
)
CAPTION_ENDINGS = (".txt", ".caption")
TABLE_ENDINGS = (".jsonl", ".csv", ".tsv")
SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")
TABLES = ("metadata.jsonl", "metadata.csv")
IMAGE_KEYS = ("image", "file_name", "path", "file", "jpg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "prompt")
HUB = "hf:"

_LEFT_ALONE = {*CAPTION_ENDINGS, *TABLE_ENDINGS, ".json", ".npz", ".md", ".toml", ""}
"""Endings of files in a folder that are no pictures, and that nobody takes for one."""

_REPEATS = re.compile(r"(\d+)_.+")
"""A folder's name in kohya's layout, as 10_fox: its pictures count ten times."""


class DataError(TwostepError):
    """A source without pictures, or one that is not what it says."""


@dataclass(frozen=True)
class Entry:
    """A picture of a source.

    Attributes:
        name: in the source; the same in every run.
        caption: the first; None if it has none.
        read: returns the bytes of its file, or the picture itself.
        more_captions: those after the first.
        weight: how often it is drawn in training, beside 1 for others.
        problem: why it cannot be used, where that is known before it is read.
    """

    name: str
    caption: str | None
    read: Callable[[], bytes | Image.Image]
    more_captions: tuple[str, ...] = ()
    weight: float = 1.0
    problem: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that are not blank."""
        return captions_of((self.caption, *self.more_captions))


@dataclass(frozen=True)
class Columns:
    """Which values of a table, or of a dataset's rows, are what.

    Attributes:
        image: names of the picture, the first that there is counts.
        caption: names of the caption.
    """

    image: tuple[str, ...] = IMAGE_KEYS
    caption: tuple[str, ...] = CAPTION_KEYS


@dataclass
class Findings:
    """What is worth saying of a source, beside its pictures.

    Attributes:
        other_files: endings of files that were left alone, and how many had each.
        unlisted: tables, and how many pictures lie beside each that it does not list.
        repeats: folders in kohya's layout, and how often each counts.
    """

    other_files: Counter[str] = field(default_factory=Counter)
    unlisted: Counter[str] = field(default_factory=Counter)
    repeats: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Demands:
    """What a picture must be to be used: large and sharp, as in section 3.6 of arXiv 2402.13929.

    Attributes:
        min_side: of its width and height, in pixels.
        min_sharpness: as of `sharpness`; 0 asks for nothing.
    """

    min_side: int = 0
    min_sharpness: float = 0.0


def find_entries(
    source: str,
    *,
    columns: Columns | None = None,
    weights: Mapping[str, float] | None = None,
    findings: Findings | None = None,
) -> Iterator[Entry]:
    """Yield the pictures of a source in a fixed order, each to be read in its turn.

    A name that comes again gets its number: "a.png", "a.png#2".

    Args:
        source: a folder with `x.txt` or `x.caption` beside `x.png`, or of .tar shards; a .jsonl,
            .csv or .tsv file; a pattern of .tar shards, also with {000..127}; or `hf:name` of a
            Hugging Face dataset.
        columns: which values of a table are what.
        weights: beginning of names -> weight of those entries; the longest beginning counts.
        findings: takes what is worth saying of the source.

    Raises:
        DataError: the source is missing, empty, damaged or of no known kind.
    """
    entries = _found(source, columns or Columns(), findings or Findings())
    first = next(entries, None)
    if first is None:
        raise DataError(f"{source} holds no pictures; known endings are {' '.join(ENDINGS)}.")
    counts: Counter[str] = Counter()
    for entry in itertools.chain([first], entries):
        counts[entry.name] += 1
        number = counts[entry.name]
        name = entry.name if number == 1 else f"{entry.name}#{number}"
        yield replace(entry, name=name, weight=entry.weight * _weight(entry.name, weights or {}))


def find_all_entries(
    sources: Sequence[str],
    *,
    columns: Columns | None = None,
    weights: Mapping[str, float] | None = None,
    findings: Findings | None = None,
) -> Iterator[Entry]:
    """Yield the pictures of several sources, one after the other.

    Of more than one source the names begin with the source's own, as in "fox/a.png"; `weights`
    may name a whole source so.
    """
    if len(sources) == 1:
        yield from find_entries(sources[0], columns=columns, weights=weights, findings=findings)
        return
    counts: Counter[str] = Counter()
    for source in sources:
        own_name = Path(source.removeprefix(HUB)).name or source
        counts[own_name] += 1
        prefix = own_name if counts[own_name] == 1 else f"{own_name}#{counts[own_name]}"
        for entry in find_entries(source, columns=columns, findings=findings):
            name = f"{prefix}/{entry.name}"
            yield replace(entry, name=name, weight=entry.weight * _weight(name, weights or {}))


def read_picture(entry: Entry, demands: Demands) -> Image.Image:
    """Return the picture in RGB, upright and on white; UnusablePictureError with the reason if it
    cannot be used.
    """
    if entry.problem is not None:
        raise UnusablePictureError(entry.problem)
    if not entry.captions:
        raise UnusablePictureError("it has no caption")
    picture = open_picture(entry.read)
    if min(picture.size) < demands.min_side:
        raise UnusablePictureError(
            f"it is {picture.width}x{picture.height}, smaller than {demands.min_side} px"
        )
    if demands.min_sharpness > 0 and (found := sharpness(picture)) < demands.min_sharpness:
        raise UnusablePictureError(f"its sharpness is {found:.4f}, below {demands.min_sharpness:g}")
    return picture


def _found(source: str, columns: Columns, findings: Findings) -> Iterator[Entry]:
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), columns)
    if source.endswith(SHARD_ENDINGS):
        return _from_shards(_matches(source), source, columns)
    if Path(source).suffix.lower() in TABLE_ENDINGS:
        return _from_table(Path(source), columns)
    return _from_folder(Path(source), columns, findings)


def _weight(name: str, weights: Mapping[str, float]) -> float:
    """Return the weight of the longest beginning of a name that has one."""
    matching = [start for start in weights if name == start or name.startswith(f"{start}/")]
    return weights[max(matching, key=len)] if matching else 1.0


def _from_folder(folder: Path, columns: Columns, findings: Findings) -> Iterator[Entry]:
    """Read `x.txt` beside `x.png`, in subfolders too, or what tables in them list."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder, .jsonl or .csv file, .tar shard or {HUB}name of a dataset."
        )
    files = sorted(_files(folder))
    tables = _tables(files)
    for path in files:
        if path.suffix.lower() not in (*ENDINGS, *_LEFT_ALONE):
            findings.other_files[path.suffix.lower()] += 1
    pictures = [path for path in files if path.suffix.lower() in ENDINGS]
    for table in tables:
        covered = [path for path in pictures if table.parent in path.parents]
        listed: set[str] = set()
        yield from _from_table(table, columns, folder, listed)
        unlisted = sum(os.path.normpath(path) not in listed for path in covered)
        if unlisted:
            findings.unlisted[_printable(str(table.relative_to(folder)))] = unlisted
    pictures = [
        path for path in pictures if not any(table.parent in path.parents for table in tables)
    ]
    shards = [str(path) for path in files if path.name.endswith(SHARD_ENDINGS)]
    if shards and not pictures and not tables:
        yield from _from_shards(shards, str(folder), columns)
        return
    texts = _texts(files)
    repeats = _repeats(folder, pictures)
    findings.repeats.update(repeats)
    for path in pictures:
        relative = path.relative_to(folder)
        weight = float(repeats.get(relative.parts[0], 1)) if len(relative.parts) > 1 else 1.0
        beside = texts.get(path.with_suffix(""), {})
        yield _from_file(path, _printable(str(relative)), weight, beside)


def _tables(files: Sequence[Path]) -> list[Path]:
    """Return the tables among files that list the pictures of a folder and of all below it.

    Of two in one folder the first in `TABLES` counts, and none counts below another.
    """
    found: dict[Path, Path] = {}
    for name in TABLES:
        for path in files:
            if path.name == name:
                found.setdefault(path.parent, path)
    return [
        table
        for place, table in sorted(found.items())
        if not any(above in found for above in place.parents)
    ]


def _texts(files: Sequence[Path]) -> dict[Path, dict[str, Path]]:
    """Return the files of captions by the picture's path without its ending, and their own ending.

    Windows' programs write endings in either case; of two, the one in small letters counts.
    """
    texts: dict[Path, dict[str, Path]] = {}
    for path in files:
        # Capitals come first.
        if path.suffix.lower() in CAPTION_ENDINGS:
            texts.setdefault(path.with_suffix(""), {})[path.suffix.lower()] = path
    return texts


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder, also of linked ones, and no folder twice in a row of links."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        for name in list(folders):
            real = os.path.realpath(os.path.join(place, name))
            if real in seen and os.path.commonpath([real, os.path.realpath(place)]) == real:
                # A link to a folder that it lies in would go round for ever.
                folders.remove(name)
            seen.add(real)
        for name in names:
            if not name.startswith("."):
                yield Path(place, name)


def _repeats(folder: Path, pictures: Sequence[Path]) -> dict[str, int]:
    """Return how often each subfolder counts, if all are named as kohya's: 10_fox."""
    places = {path.relative_to(folder).parent.parts[:1] for path in pictures}
    matches = [_REPEATS.fullmatch(place[0]) if place else None for place in places]
    if not matches or any(match is None or int(match[1]) < 1 for match in matches):
        return {}
    return {match[0]: int(match[1]) for match in matches if match is not None}


def _from_file(path: Path, name: str, weight: float, beside: Mapping[str, Path]) -> Entry:
    """Return a picture file with the captions beside it, which are given by their endings."""
    texts = [beside[ending] for ending in CAPTION_ENDINGS if ending in beside]
    try:
        captions = captions_of([decode(text.read_bytes()) for text in texts])
    except UnreadableTextError as error:
        return Entry(name, None, path.read_bytes, problem=f"of its caption, {error}")
    except OSError as error:
        return Entry(name, None, path.read_bytes, problem=f"its caption cannot be read ({error})")
    return _entry(name, captions, path.read_bytes, weight=weight)


def _from_table(
    file: Path, columns: Columns, folder: Path | None = None, listed: set[str] | None = None
) -> Iterator[Entry]:
    """Read a row for every picture: its path relative to the file, and its captions.

    Args:
        file: the table.
        columns: which of its values are what.
        folder: that names begin in, if not the table's own.
        listed: takes the paths of the pictures.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist.")
    try:
        rows = list(read_rows(file))
    except UnreadableTextError as error:
        raise DataError(f"{file}: {error}.") from error
    start = Path() if folder is None else file.parent.relative_to(folder)
    for number, values in rows:
        place = _printable(f"{start / file.name} line {number}")
        if isinstance(values, str):
            yield _broken(place, values)
            continue
        image = _value(values, columns.image)
        if image is None:
            yield _broken(place, _no_column(values, columns.image, "picture", "--image-column"))
            continue
        path = file.parent / str(image)
        if listed is not None:
            listed.add(os.path.normpath(path))
        name = os.path.normpath(start / str(image)) if start.parts else str(image)
        yield _of_row(_printable(name), values, columns, path.read_bytes)


def _matches(pattern: str) -> list[str]:
    """Return the files of a pattern, in which {000..127} stands for each of the numbers."""
    ranges = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if ranges is None:
        # A name with brackets is a file before it is a pattern.
        return [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
    first, last = ranges.groups()
    paths: list[str] = []
    for number in range(int(first), int(last) + 1):
        text = str(number).zfill(len(first))
        paths += _matches(pattern[: ranges.start()] + text + pattern[ranges.end() :])
    return paths


def _from_shards(paths: list[str], source: str, columns: Columns) -> Iterator[Entry]:
    """Read webdataset shards; one that is no whole tar is reported, after what can be read."""
    if not paths:
        raise DataError(f"{source} does not exist.")
    for path in paths:
        shard = _printable(Path(path).name)
        try:
            with tarfile.open(path) as tar:
                yield from _from_shard(tar, shard, columns)
        except (tarfile.TarError, OSError, EOFError) as error:
            if len(paths) == 1 and isinstance(error, tarfile.ReadError):
                raise DataError(
                    f"{path} is no whole tar file ({error}). Fetch it again, or leave it out."
                ) from error
            yield _broken(shard, f"it is no whole tar file ({error})")


def _from_shard(tar: tarfile.TarFile, shard: str, columns: Columns) -> Iterator[Entry]:
    """Group a webdataset shard's members by their names without ending: x.jpg with x.txt.

    Hidden ones are left out, as in folders: macOS puts `._x.jpg` beside `x.jpg`.
    """
    members = {
        posixpath.normpath(member.name): member
        for member in tar.getmembers()
        if member.isfile() and not posixpath.basename(member.name).startswith(".")
    }
    texts = {}
    for name, member in members.items():
        stem, ending = posixpath.splitext(name)
        if ending.lower() in (*CAPTION_ENDINGS, ".json"):
            texts[stem + ending.lower()] = member
    for name, member in members.items():
        stem, ending = posixpath.splitext(name)
        if ending.lower() not in ENDINGS:
            continue
        whole = f"{shard}/{_printable(stem)}"
        content = _content(tar, member)
        try:
            captions = _shard_captions(tar, texts, stem, columns)
        except (UnreadableTextError, ValueError) as error:
            yield Entry(whole, None, _returning(content), problem=f"of its caption, {error}")
            continue
        yield _entry(whole, captions, _returning(content))


def _shard_captions(
    tar: tarfile.TarFile, texts: Mapping[str, tarfile.TarInfo], stem: str, columns: Columns
) -> tuple[str, ...]:
    """Return the captions of a picture in a shard.

    They lie under its name up to the last dot, or else, as webdataset has it, up to the first.
    """
    folder, base = posixpath.split(stem)
    for start in dict.fromkeys((stem, posixpath.join(folder, base.partition(".")[0]))):
        for ending in CAPTION_ENDINGS:
            if start + ending in texts:
                return captions_of(decode(_content(tar, texts[start + ending])))
        if f"{start}.json" in texts:
            text = decode(_content(tar, texts[f"{start}.json"]))
            return _json_captions(text, columns)
    return ()


def _json_captions(text: str, columns: Columns) -> tuple[str, ...]:
    values = _json(text)
    if isinstance(values, dict):
        return captions_of(_value(values, columns.caption))
    # Some sets hold a bare text, or a list of them.
    is_text = isinstance(values, str) or (
        isinstance(values, list) and all(isinstance(value, str) for value in values)
    )
    return captions_of(values) if is_text else ()


def _json(text: str) -> Any:
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableTextError(f"it is no JSON ({error})") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def _from_hub(name: str, columns: Columns) -> Iterator[Entry]:
    """Read a dataset by name or folder, "name" or "name:split", with the `datasets` library."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face datasets need `pip install twostep[datasets]`.") from error
    name, _, split = name.partition(":")
    rows = datasets.load_dataset(name, split=split or "train")
    for key, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            # As bytes, so that a picture that cannot be read breaks nothing but itself.
            rows = rows.cast_column(key, datasets.Image(decode=False))
    for number, row in enumerate(rows):
        place = f"{name}/{number}"
        if not any(key in row for key in columns.image):
            raise DataError(
                f"{name} has the columns {', '.join(row)}; expected one of {columns.image}: "
                "--image-column says which is the picture."
            )
        image = _value(row, columns.image)
        if image is None:
            yield _broken(place, "its picture is missing")
            continue
        yield _of_row(place, row, columns, _reading(image))


def _reading(image: Any) -> Callable[[], bytes | Image.Image]:
    """Return what reads the picture of a dataset's row: bytes, a path, or both or a picture."""

    def read() -> bytes | Image.Image:
        if isinstance(image, dict):
            return image["bytes"] or Path(image["path"]).read_bytes()
        if isinstance(image, str):
            return Path(image).read_bytes()
        if isinstance(image, (bytes, Image.Image)):
            return image
        raise ValueError(f"a picture of the type {type(image).__name__} is not known")

    return read


def _of_row(
    name: str,
    values: Mapping[str, Any],
    columns: Columns,
    read: Callable[[], bytes | Image.Image],
) -> Entry:
    """Return the entry of a row of a table or dataset."""
    try:
        captions = captions_of(_value(values, columns.caption))
    except UnreadableTextError as error:
        return Entry(name, None, read, problem=f"of its caption, {error}")
    if not captions and not any(key in values for key in columns.caption):
        problem = _no_column(values, columns.caption, "caption", "--caption-column")
        return Entry(name, None, read, problem=problem)
    return _entry(name, captions, read)


def _entry(
    name: str,
    captions: tuple[str, ...],
    read: Callable[[], bytes | Image.Image],
    *,
    weight: float = 1.0,
) -> Entry:
    first = captions[0] if captions else None
    return Entry(name, first, read, captions[1:], weight)


def _broken(name: str, problem: str) -> Entry:
    """Return an entry that stands for what could not even be found."""
    return Entry(name, None, io.BytesIO().read, problem=problem)


def _returning(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _no_column(values: Mapping[str, Any], keys: Sequence[str], what: str, flag: str) -> str:
    return (
        f"it has no {what} among {', '.join(map(str, values))}: names for the {what} are "
        f"{', '.join(keys)}, and {flag} says another"
    )


def _value(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value under one of the keys that is not empty; None if there is none."""
    return next((values[key] for key in keys if not is_missing(values.get(key))), None)


def _printable(name: str) -> str:
    """Return a file's name as text; bytes that are no UTF-8 are written as their codes."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
