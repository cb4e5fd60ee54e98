"""Text that people give: captions, lists of prompts, tables, in whatever encoding it was saved."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from twostep.errors import TwostepError

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""In this order, because the mark of UTF-32 begins as that of UTF-16."""

_MOST_ACCENTS = 0.3
"""Western text has a smaller share of bytes beyond ASCII; what has more is in another encoding."""


class UnreadableTextError(TwostepError):
    """Text in no encoding that is known, or a line that is not what it should be."""


def decode(data: bytes) -> str:
    """Return text from the bytes of a file.

    UTF-8, with and without a mark, UTF-16 and UTF-32 with one, UTF-16 of mostly Latin letters
    without, and Windows-1252, which printed Latin-1 is a part of.

    Raises:
        UnreadableTextError: it is in none of them.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decoded(data, encoding)
    if b"\0" in data:
        # Every second byte of Latin letters in UTF-16 is zero.
        return _decoded(data, "utf-16-be" if data[:1] == b"\0" else "utf-16-le")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    num_beyond_ascii = sum(byte > 127 for byte in data)
    if num_beyond_ascii > _MOST_ACCENTS * len(data):
        raise UnreadableTextError("its text is in no encoding that is known: save it as UTF-8")
    return _decoded(data, "cp1252")


def _decoded(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableTextError(
            f"its text is in no encoding that is known ({error.reason}): save it as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, parted by line feeds and nothing else.

    Other separators, such as U+2028, belong to the text of a line.
    """
    return [line.removesuffix("\r") for line in decode(path.read_bytes()).split("\n")]


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield the rows of a table with their numbers: its values by column, or what is wrong with it.

    Args:
        path: of a .jsonl file with an object on every line, or of a .csv or .tsv file whose first
            line names the columns.
    """
    if path.suffix.lower() != ".jsonl":
        yield from _csv_rows(path)
        return
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield number, f"it is no JSON ({error})"
            continue
        if isinstance(values, dict):
            yield number, values
        else:
            yield number, 'it is no JSON object such as {"image": "a.png", "caption": "a fox"}'


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    text = io.StringIO(decode(path.read_bytes()), newline="")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(text, delimiter=delimiter, restkey="")
    for row in reader:
        if "" in row:
            yield reader.line_num, f"it has more values than the {len(row) - 1} columns"
        else:
            yield reader.line_num, dict(row)


def captions_of(value: Any) -> tuple[str, ...]:
    """Return the captions in a value of a table: a text, or several, without empty ones."""
    several: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    texts = (str(text).strip() for text in several if text is not None)
    return tuple(text for text in texts if text)
