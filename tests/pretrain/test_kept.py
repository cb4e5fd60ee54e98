"""What is made once is read afterwards, and what cannot be read is refused."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from twostep.errors import TwostepError
from twostep.pretrain.kept import made_once, refusing_damage


@dataclass(frozen=True)
class Text:
    """What is kept."""

    text: str

    def save(self, path: Path) -> None:
        path.write_text(self.text)


class TextError(TwostepError):
    """A text that cannot be read."""


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "text"
    made = [Text("second"), Text("first")]
    assert made_once(path, made.pop, Path.read_text) == "first"
    assert made_once(path, made.pop, Path.read_text) == "first"
    path.unlink()
    assert made_once(path, made.pop, Path.read_text) == "second"


@pytest.mark.parametrize("damage", ["no file", "no safetensors file", "a folder", "something else"])
def test_what_cannot_be_read_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    if damage == "no safetensors file":
        path.write_bytes(b"text")
    elif damage == "a folder":
        path.mkdir()
    elif damage == "something else":
        path.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    expected = rf"{path} holds no text \(.+\)\. Delete it; it is written again\."
    with (
        pytest.raises(TextError, match=expected),
        refusing_damage(path, TextError, "holds no text", "it is written again"),
        safe_open(path, "pt") as file,
    ):
        raise KeyError(file.metadata())


def test_other_faults_stay_what_they_are(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        refusing_damage(tmp_path, TextError, "holds no text", "it is written again"),
    ):
        raise ZeroDivisionError
