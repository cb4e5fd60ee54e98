"""Folders of weights appear whole, or it is said what the system refused."""

import re
from pathlib import Path

import pytest

from twostep.files import WriteError
from twostep.formats.folders import weights_folder


def test_what_a_library_in_rust_says_of_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match=r"No space left on device.*free some space"),
        weights_folder(tmp_path / "model") as partial,
    ):
        (partial / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [Exception("what is this?"), ValueError("(os error 28)")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(type(error), match=re.escape(str(error))),
        weights_folder(tmp_path / "model"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []
