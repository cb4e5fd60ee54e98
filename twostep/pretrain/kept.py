"""What is made once, by the first of several processes, and read from its file afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from safetensors import SafetensorError

from twostep.errors import TwostepError
from twostep.training.processes import wait, world

_Kept = TypeVar("_Kept")


@runtime_checkable
class _Saves(Protocol):
    def save(self, path: Path) -> None:
        """Write it to a file."""


def made_once(path: Path, make: Callable[[], _Saves], load: Callable[[Path], _Kept]) -> _Kept:
    """Read a file, after the first process has made what is in it if the file is missing.

    Args:
        path: of the file.
        make: makes what is in it.
        load: reads it, in every process.
    """
    if world().is_first and not path.exists():
        make().save(path)
    wait()
    return load(path)


@contextmanager
def refusing_damage(
    path: Path, refusal: type[TwostepError], problem: str, remedy: str
) -> Iterator[None]:
    """Refuse a safetensors file that the block cannot read, or that lacks what it looks for.

    Args:
        path: of the file.
        refusal: the error that is raised.
        problem: what is wrong with the file, for a person, as in "holds no notes".
        remedy: what happens once it is deleted, as in "they are rendered again".
    """
    try:
        yield
    except (OSError, SafetensorError, KeyError) as error:
        raise refusal(f"{path} {problem} ({error!r}). Delete it; {remedy}.") from error
