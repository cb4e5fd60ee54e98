"""Text in the encodings that people save it in, and tables with broken rows."""

import unicodedata
from pathlib import Path

import pytest

from twostep.data.texts import UnreadableTextError, captions_of, decode, read_lines, read_rows

CAFE = "a caf\xe9\u2019s red apple"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "utf-16-le", "utf-16-be"]
)
def test_text_is_read_whatever_it_was_saved_in(encoding: str) -> None:
    assert decode(CAFE.encode(encoding)) == CAFE


def test_latin_1_is_read() -> None:
    assert decode("déjà vu, 100 £".encode("latin-1")) == "déjà vu, 100 £"


@pytest.mark.parametrize(
    "data",
    [
        "一个红苹果".encode("gbk"),
        "赤いりんご".encode("shift_jis"),
        "красное яблоко".encode("cp1251"),
        b"half of UTF-16 \xff\xfe"[-2:] + b"\x00",
        b"apple \x81 pie",
    ],
    ids=["gbk", "shift-jis", "cp1251", "half", "undefined"],
)
def test_what_would_be_read_wrongly_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableTextError, match="no encoding that is known"):
        decode(data)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a red\u2028apple\r\nb\x85c\x0cd\n".encode())
    assert read_lines(path) == ["a red\u2028apple", "b\x85c\x0cd", ""]


def test_broken_rows_break_nothing_but_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a"}\n\n[1]\n{"image": "b\n{"image": "c"}')
    rows = dict(read_rows(path))
    assert rows[1] == {"image": "a"} and rows[5] == {"image": "c"}
    assert "no JSON object" in str(rows[3]) and "no JSON (" in str(rows[4])


@pytest.mark.parametrize(("ending", "mark"), [("csv", ","), ("tsv", "\t")])
def test_tables_have_quoted_values_and_columns_by_name(
    ending: str, mark: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    text = f'file_name{mark}text\na.png{mark}"red{mark} ""ripe"" apple\nof two lines"\n'
    path.write_text(f"{text}b.png{mark}x{mark}y\n", encoding="utf-8-sig")
    (_, first), (_, second) = read_rows(path)
    assert first == {"file_name": "a.png", "text": f'red{mark} "ripe" apple\nof two lines'}
    assert "more values than the 2 columns" in str(second)


def test_captions_are_one_or_several() -> None:
    assert captions_of(" a fox ") == ("a fox",)
    assert captions_of(["a", "", None, " b"]) == ("a", "b")
    assert captions_of(None) == captions_of("  ") == ()


@pytest.mark.parametrize("missing", [None, float("nan"), "", [], [None, " ", float("nan")]])
def test_a_missing_caption_is_none(missing: object) -> None:
    assert captions_of(missing) == ()


@pytest.mark.parametrize("label", [7, 0.5, True, {"en": "a fox"}, [["a fox"]], ["a fox", 3]])
def test_a_caption_that_is_no_text_is_no_caption(label: object) -> None:
    with pytest.raises(UnreadableTextError, match="which is no text"):
        captions_of(label)


def test_pictograms_that_are_newer_than_python_s_tables_are_text() -> None:
    assert unicodedata.category("\U0001faea") == "Cn"
    assert decode("a fox \U0001faea".encode()) == "a fox \U0001faea"
    with pytest.raises(UnreadableTextError, match=r"U\+0378"):
        decode("a fox \u0378".encode())
