"""What the system refuses, in a line with what to do about it, whoever notices it first."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from twostep.cli import app
from twostep.files import WriteError, write_atomically

from ..disks import mounted

_NOBODY = 65534

Refusing = Callable[[Path], Path]
"""Makes a place that cannot be written in a folder, and returns it."""


def without_permission(folder: Path) -> Path:
    folder.chmod(0o555)
    return folder / "file"


def under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "below" / "it"


def of_a_long_name(folder: Path) -> Path:
    return folder / ("long" * 100)


def a_folder(folder: Path) -> Path:
    (folder / "there").mkdir()
    return folder / "there"


REFUSED = [
    (without_permission, errno.EACCES, "give another place, or change who may use this one"),
    (under_a_file, errno.ENOTDIR, "a part of its path is a file; give another place"),
    (of_a_long_name, errno.ENAMETOOLONG, "give a shorter name"),
    (a_folder, errno.EISDIR, "there is a folder of that name; give the name of a file"),
]
"""How a place refuses, with which error of the system, and what is to be done."""


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Let permissions count in the block, which for root they do not."""
    if os.geteuid() != 0:
        yield
        return
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    os.chown(folder, _NOBODY, -1)
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def run_verb(act: Callable[[], object]) -> Result:
    """Run a function as a verb of the command line."""
    cli = typer.Typer(cls=app.info.cls)
    cli.command("act")(lambda: act())
    cli.command("another")(lambda: None)
    return CliRunner().invoke(cli, ["act"], env={"COLUMNS": "400"})


@pytest.mark.parametrize(("refusing", "number", "advice"), REFUSED)
def test_what_no_verb_foresaw_is_told_in_a_line(
    refusing: Refusing, number: int, advice: str, tmp_path: Path
) -> None:
    place = refusing(tmp_path)
    with as_nobody(tmp_path):
        result = run_verb(lambda: place.write_bytes(b"x"))
    assert (result.exit_code, result.stdout) == (1, "")
    reason = os.strerror(number)
    expected = f"error: {place}: {reason}: {advice}. What was saved before is whole.\n"
    assert result.stderr == expected


@pytest.mark.parametrize(("refusing", "number", "advice"), REFUSED)
def test_a_writer_gives_the_same_advice(
    refusing: Refusing, number: int, advice: str, tmp_path: Path
) -> None:
    place = refusing(tmp_path)

    def write() -> None:
        with write_atomically(place) as file:
            file.write(b"x")

    with as_nobody(tmp_path):
        result = run_verb(write)
    assert (result.exit_code, result.stdout) == (1, "")
    reason = os.strerror(number)
    assert result.stderr == (
        f"error: {place} cannot be written ({reason}): {advice}. What was saved before is whole.\n"
    )
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_full_device_has_no_name_and_is_told_all_the_same() -> None:
    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    result = run_verb(write)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: No space left on device: the disk is full; free some space. "
        "What was saved before is whole.\n"
    )


def test_a_disk_that_is_mounted_for_reading_is_told(tmp_path: Path) -> None:
    with mounted(tmp_path, options="ro"):
        with (
            pytest.raises(WriteError, match=r"Read-only file system\): nothing can be written"),
            write_atomically(tmp_path / "file"),
        ):
            raise AssertionError("nothing was to be written")
        result = run_verb(lambda: (tmp_path / "file").write_bytes(b"x"))
    assert "Read-only file system: nothing can be written there" in result.stderr


def test_what_is_not_there_is_named() -> None:
    result = run_verb(Path("nowhere/file").read_bytes)
    assert result.stderr.startswith(
        "error: nowhere/file: No such file or directory: there is nothing of that name; check it."
    )
