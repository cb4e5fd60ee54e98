"""500 damaged captions, and tables of them: right, refused in a line, and never a traceback."""

import json
import random
import unicodedata
from pathlib import Path

import pytest

from twostep.data.texts import UnreadableTextError, decode, read_rows

TEXTS = (
    "a red apple on a blue background, flat",
    "a caf\u00e9\u2019s red apple, d\u00e9j\u00e0 vu",
    "\u4e00\u4e2a\u7ea2\u82f9\u679c, \u8d64\u3044\u308a\u3093\u3054",
    "\u043a\u0440\u0430\u0441\u043d\u043e\u0435 \u044f\u0431\u043b\u043e\u043a\u043e \U0001f34e",
)

WAYS = ("bit", "zeros", "cut", "noise", "binary")


def encodings(text: str) -> list[str]:
    """The encodings that are recognised and have all letters of a text."""
    known = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
    try:
        text.encode("cp1252")
    except UnicodeEncodeError:
        return known
    return [*known, "utf-16-le", "utf-16-be", "cp1252"]


def damage(data: bytes, how: str, rng: random.Random) -> bytes:
    changed = bytearray(data)
    place = rng.randrange(len(data))
    if how == "bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        length = rng.randint(1, 8)
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    elif how == "cut":
        del changed[place:]
    elif how == "noise":
        changed[place : place + 4] = rng.randbytes(4)
    else:
        changed = bytearray(rng.randbytes(rng.randint(8, 200)))
    return bytes(changed)


def test_500_damaged_captions() -> None:
    rng = random.Random(0)
    refused = 0
    for case in range(500):
        text = TEXTS[case % len(TEXTS)]
        how = WAYS[case // len(TEXTS) % len(WAYS)]
        encoding = rng.choice(encodings(text))
        data = text.encode(encoding)
        damaged = damage(data, how, rng)
        try:
            read = decode(damaged)
        except UnreadableTextError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        kinds = {unicodedata.category(sign) for sign in read if sign not in "\t\n\v\f\r\x85"}
        assert not kinds & {"Cc", "Cn", "Cs"}, damaged
        if how == "cut":
            # Half a letter is refused, or is one of Windows-1252 at the very end.
            assert text.startswith(read) or text.startswith(read[:-2]), (damaged, read)
        # Half of a letter of 16 bits may be zero.
        assert how != "zeros" or encoding[:6] in ("utf-16", "utf-32"), (damaged, read)
    assert 150 < refused < 450


@pytest.mark.parametrize("ending", [pytest.param("jsonl", marks=pytest.mark.slow), "csv"])
def test_250_damaged_tables_lose_no_more_than_their_damaged_rows(
    ending: str, tmp_path: Path
) -> None:
    rng = random.Random(ending)
    path = tmp_path / f"a.{ending}"
    lines = [f"p{i}.png,{text.replace(',', ' ')}" for i, text in enumerate(TEXTS)]
    if ending == "jsonl":
        lines = [json.dumps({"image": f"p{i}.png", "caption": t}) for i, t in enumerate(TEXTS)]
        lines += ["9" * 5000, "[" * 2000]
    header = [] if ending == "jsonl" else ["image,caption"]
    whole = "\n".join([*header, *lines]).encode()
    for case in range(250):
        path.write_bytes(damage(whole, WAYS[case % 3], rng))
        try:
            rows = list(read_rows(path))
        except UnreadableTextError:
            continue
        for number, row in rows:
            assert number > 0 and isinstance(row, (dict, str))
            assert isinstance(row, dict) or "\n" not in row


def test_a_row_that_is_nested_too_deep_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + '\n{"caption": "x"}')
    rows = dict(read_rows(path))
    assert "no JSON" in str(rows[1]) and rows[2] == {"caption": "x"}


def test_a_value_longer_than_csv_s_limit_is_one_broken_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("image,caption\na.png,x\nb.png," + "y" * 200_000 + "\nc.png,z\n")
    rows = dict(read_rows(path))
    assert rows[2] == {"image": "a.png", "caption": "x"}
    assert rows[4] == {"image": "c.png", "caption": "z"}
    assert "no row of a table" in str(rows[3])


@pytest.mark.parametrize(
    "data",
    [
        b"a red apple\0\0\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"a red\x07 apple",
        "caf\u00e9, d\u00e9".encode()[:-1],
    ],
    ids=["zeros", "a picture", "a bell", "half a letter"],
)
def test_what_is_damaged_or_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableTextError):
        decode(data)
