"""Text that people give: captions, lists of prompts, tables, in whatever encoding it was saved."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import unicodedata
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

_UTF_8_LETTER = re.compile(rb"[\xc3-\xcf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")
"""A letter beyond ASCII in UTF-8, of two bytes or three."""

_LAYOUT = "\t\n\v\f\r\x85"
"""The control characters that are part of text."""

_YEARLY = frozenset(map(chr, range(0x1F000, 0x1FB00)))
"""The pictograms, of which there are more every year than Python's tables know."""


class UnreadableTextError(TwostepError):
    """Text in no encoding that is known, or a line that is not what it should be."""


def decode(data: bytes) -> str:
    """Return text from the bytes of a file.

    UTF-8, with and without a mark, UTF-16 and UTF-32 with one, UTF-16 of mostly Latin letters
    without, and Windows-1252, which printed Latin-1 is a part of.

    Raises:
        UnreadableTextError: it is in none of them, or holds characters that no text has.
    """
    text = _decoded(data, _encoding_of(data))
    strange = next((sign for sign in text if _is_strange(sign)), None)
    if strange is not None:
        raise UnreadableTextError(
            f"it holds the character U+{ord(strange):04X}, which no text has: it is damaged, or no "
            "text"
        )
    return text


def _encoding_of(data: bytes) -> str:
    """Return the encoding of text by its first bytes, its zeros, and its letters beyond ASCII."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return encoding
    if b"\0" in data:
        # Every second byte of Latin letters in UTF-16 is zero; elsewhere none is.
        for encoding, zeros in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
            if zeros.count(0) > len(zeros) / 2 and zeros.count(0) == data.count(0):
                return encoding
        raise UnreadableTextError("it holds bytes of zero: it is damaged, or no text")
    if _is_utf_8(data):
        return "utf-8"
    num_beyond_ascii = sum(byte > 127 for byte in data)
    if num_beyond_ascii > _MOST_ACCENTS * len(data):
        raise UnreadableTextError("its text is in no encoding that is known: save it as UTF-8")
    if _UTF_8_LETTER.search(data):
        # Two such letters in a row mean nothing in Western languages.
        raise UnreadableTextError("its text is damaged UTF-8: save it again")
    return "cp1252"


def _is_utf_8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_strange(sign: str) -> bool:
    """Tell whether a character is a control character that lays no text out, or none at all."""
    if sign in _LAYOUT or sign in _YEARLY:
        return False
    return unicodedata.category(sign) in ("Cc", "Cn")


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
        except (ValueError, RecursionError) as error:
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
    rows = iter(reader)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            # A quotation mark that is never closed, most often; what it swallowed is one row.
            yield reader.line_num + 1, f"it is no row of a table ({error})"
            continue
        if "" in row:
            yield reader.line_num, f"it has more values than the {len(row) - 1} columns"
        else:
            yield reader.line_num, dict(row)


def captions_of(value: Any) -> tuple[str, ...]:
    """Return the captions in a value of a table: a text, or several, without empty ones.

    Raises:
        UnreadableTextError: something there is no text, but a number or an object: a column of
            labels, say, whose numbers would be learned as words.
    """
    several: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    present = [each for each in several if not is_missing(each)]
    for each in present:
        if not isinstance(each, str):
            shown = repr(each) if len(repr(each)) <= 40 else f"{repr(each)[:37]}..."
            raise UnreadableTextError(f"it is {shown}, which is no text")
    texts = (text.strip() for text in present)
    return tuple(text for text in texts if text)


def is_missing(value: Any) -> bool:
    """Tell whether a value stands for none: null, the NaN that pandas writes for it, emptiness."""
    return value in (None, "", []) or (isinstance(value, float) and math.isnan(value))
