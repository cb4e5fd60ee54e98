"""Small disks that can be full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ENOUGH = 2**26
"""Bytes in which everything has room that is written on such a disk."""


class Disk:
    """A mounted disk of its own size.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, size: int) -> None:
        """Let it have so many bytes, which must not be less than are used."""
        options = f"remount,size={size}"
        subprocess.run(["mount", "-o", options, str(self.path)], check=True, capture_output=True)

    @property
    def used(self) -> int:
        """How many bytes are used."""
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize


@contextmanager
def mounted(path: Path, size: int = ENOUGH, *, options: str = "rw") -> Iterator[Disk]:
    """Mount a disk at a folder, or skip the test where that is not allowed."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},size={size}", "none", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only root can mount a disk ({error})")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)
