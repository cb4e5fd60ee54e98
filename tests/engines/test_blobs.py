"""Blobs come back as they were, what is damaged is refused, and the oldest make room."""

import os
from pathlib import Path

import pytest

from twostep.engines import blobs
from twostep.engines.blobs import BlobError, blob_folder, fingerprint, read_blob, write_blob


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path / "cache"))


def test_a_blob_comes_back() -> None:
    assert read_blob("a") is None
    body = bytes(range(256)) * 40
    assert write_blob("a", {"answer": [1]}, body)
    blob = read_blob("a")
    assert blob is not None
    assert blob.description == {"answer": [1]}
    assert blob.body.tobytes() == body


def test_damaged_blobs_are_refused() -> None:
    assert write_blob("a", {}, b"0123456789" * 1000)
    path = blob_folder() / "a.blob"
    whole = path.read_bytes()
    for damaged in (
        whole[:-1],  # cut off
        whole[:-1] + b"x",  # changed
        b"x" + whole[1:],  # no blob
        whole[:20],  # cut off in its header
        b"",
    ):
        path.write_bytes(damaged)
        with pytest.raises(BlobError, match=str(path)):
            read_blob("a")


def test_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "MAX_BYTES", 15_000)
    for age, name in enumerate("ab"):
        assert write_blob(name, {}, bytes(2_000))
        os.utime(blob_folder() / f"{name}.blob", (age, age))
    read_blob("a")  # and so is used after b
    assert write_blob("c", {}, bytes(2_000))
    assert {path.stem for path in blob_folder().iterdir()} == {"a", "c"}
    assert not write_blob("d", {}, bytes(16_000))  # larger than all may be together
    assert read_blob("d") is None


def test_where_nothing_can_be_written_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path / "file"))
    assert not write_blob("a", {}, b"1")


def test_a_fingerprint_depends_on_every_fact() -> None:
    first = fingerprint({"weights": "w", "size": (1, 4)})
    assert len(first) == 32
    assert first == fingerprint({"size": (1, 4), "weights": "w"})
    assert first != fingerprint({"weights": "w", "size": (1, 5)})
