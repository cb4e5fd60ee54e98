"""Every kind of training and of writing on a disk that is full: a line says so, nothing is lost or
left half done, and with more room the same command ends where it would have.
"""

import errno
import os
import random
from pathlib import Path

import pytest

from twostep.errors import TwostepError
from twostep.pretrain.sizes import SIZES

from ..disks import ENOUGH, mounted
from .killing import KINDS, TINY, begin_in_words, contents, figures_of, prepare, work

NUM_TRIES = 3
"""Sizes of the disk that are too small, of each kind."""

_PAGE = 4096
_NAMES = ("run", "bank", "cache", "folder", "whole", "unet", "lora", "drawings", "pictures")
"""How the names begin of what the kinds write."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all kinds read."""
    folder = tmp_path_factory.mktemp("full")
    prepare(folder)
    return folder


def attempt(kind: str, out: Path) -> str | None:
    """Work in a process of its own; return what it said if it failed in words, None if not."""
    said = out.with_suffix(".txt")
    process = begin_in_words(kind, out, said)
    process.join()
    assert process.exitcode in (0, 1), said.read_text()
    return said.read_text().splitlines()[-1] if process.exitcode else None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_full_disk_it_stops_in_words_and_with_room_it_goes_on(kind: str, folder: Path) -> None:
    seed = random.SystemRandom().randrange(2**20)
    print(f"seed {seed}")
    luck = random.Random(f"{seed} {kind}")
    whole = folder / f"{kind}-whole"
    assert attempt(kind, whole) is None
    with mounted(folder / f"{kind}-disk") as disk:
        pages = sum(-(-len(data or b"") // _PAGE) for data in contents(whole).values())
        # One has room for a single small file.
        sizes = [1, *sorted(luck.randint(1, pages) for _ in range(NUM_TRIES - 1))]
        for pages_there in sizes:
            disk.resize(max(disk.used, pages_there * _PAGE))
            before = contents(disk.path)
            message = attempt(kind, disk.path)
            print(f"{pages_there} of {pages} pages: {message}")
            if message is None:
                continue
            assert message.startswith("error: ")
            assert "free some space" in message
            after = contents(disk.path)
            assert not any(".partial" in name or ".tmp" in name for name in after)
            # What is named is what was asked for, no partial file of it.
            assert message.removeprefix("error: ").startswith(_NAMES)
            assert ".partial" not in message
            # A checkpoint makes room for the next one, and a run may take other things up.
            lost = {name for name in before.keys() - after.keys() if "checkpoints" not in name}
            assert lost == set()
        disk.resize(ENOUGH)
        assert attempt(kind, disk.path) is None
        found = contents(disk.path)
        expected = contents(whole)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        assert figures_of(disk.path) == figures_of(whole)
        # Not a byte is free: what is there stays as it is.
        disk.resize(disk.used)
        message = attempt(kind, disk.path)
        assert message is None or "free some space" in message
        assert contents(disk.path) == expected


@pytest.mark.parametrize("kind", ["vae", "cache-pictures"])
@pytest.mark.parametrize("is_last", [False, True])
def test_a_write_that_fails_is_told_and_what_follows_is_right(
    kind: str, is_last: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and the last one: without a disk of its own, and so everywhere."""
    monkeypatch.setitem(SIZES, TINY.name, TINY)
    monkeypatch.chdir(folder)
    num_done = 0
    failing: int | None = None
    see_onto_disk = os.fsync

    def failing_fsync(descriptor: int) -> None:
        nonlocal num_done
        num_done += 1
        if num_done == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        see_onto_disk(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    whole = folder / f"{kind}-{is_last}-whole"
    work(kind, whole)
    failing = num_done if is_last else 1
    num_done = 0
    out = folder / f"{kind}-{is_last}"
    with pytest.raises(TwostepError, match=r"cannot be written .*: the disk is full; free some"):
        work(kind, out)
    failing = None
    left = contents(out)
    assert left.keys() < contents(whole).keys()
    assert not any("partial" in name for name in left)
    work(kind, out)
    assert contents(out) == contents(whole)
    assert figures_of(out) == figures_of(whole)
