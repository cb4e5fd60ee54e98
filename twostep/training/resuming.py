"""What of a recipe may change between two calls that go on with one run.

Whatever cannot change the weights so far may. Fields say it themselves, in their
`json_schema_extra`: `ANY_TIME` marks those that never touch weights, `WHILE_RUNNING` those that a
part in training takes up from its next iteration on, `COMPARED` those that name something whose
contents are compared instead (`RunFolder.compare_contents`). A part that has not begun may change
altogether, and a finished one in nothing else than `ANY_TIME`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from typing_extensions import Protocol, runtime_checkable

from twostep.training.recipe import ANY_TIME, COMPARED, WHILE_RUNNING, Settings

Status = Literal["new", "running", "finished"]

SettingsT = TypeVar("SettingsT", bound=Settings)


@runtime_checkable
class _Part(Protocol):
    """A part of a recipe that has checkpoints of its own."""

    @property
    def name(self) -> str:
        """Of its checkpoints."""

    @property
    def iterations(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class Progress:
    """How far a part has come.

    Args:
        status: whether it has begun, and whether it has ended.
        num_done: iterations that are in its last checkpoint.
    """

    status: Status
    num_done: int = 0


@dataclass(frozen=True)
class Change:
    """One key that is not what it was.

    Args:
        key: its path in the recipe.
        before: its value in the run so far; None if it was not there.
        now: its value now; None if it is not there.
        refusal: why it may not change; None if it may.
    """

    key: str
    before: Any
    now: Any
    refusal: str | None = None

    def __str__(self) -> str:
        """Say what changed in one line."""
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}"


def stated_keys(settings: Settings, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys that a recipe states itself, rather than by a default."""
    for name in sorted(settings.model_fields_set):
        yield f"{path}{name}"
        yield from _stated_inside(getattr(settings, name), f"{path}{name}.")


def settled(before: SettingsT, now: SettingsT, stated_before: set[str]) -> SettingsT:
    """Return the settings under which a run goes on.

    What the recipe does not state, and did not state before, stays as it was in the run so far,
    also where a newer version has another default.

    Args:
        before: the settings so far.
        now: the recipe as it is now.
        stated_before: of `stated_keys` when the run began.
    """
    return _settled(before, now, stated_before, "")


def changes(
    before: Settings, now: Settings, progress_of: Callable[[str], Progress], whole: Progress
) -> list[Change]:
    """Return every key that differs, with what is to be said against it.

    Args:
        before: the settings so far.
        now: those of `settled`.
        progress_of: name of a part -> how far it is.
        whole: how far the run is where the recipe has no parts with names of their own.
    """
    return list(_changes(before, now, progress_of, whole, ""))


def _stated_inside(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Settings):
        yield from stated_keys(value, path)
    elif isinstance(value, tuple):
        for position, part in enumerate(value):
            yield from _stated_inside(part, f"{path}{position}.")


def _settled(before: SettingsT, now: SettingsT, stated_before: set[str], path: str) -> SettingsT:
    updates: dict[str, Any] = {}
    for name in type(now).model_fields:
        key = f"{path}{name}"
        old = getattr(before, name)
        new = getattr(now, name)
        if name not in now.model_fields_set:
            if key not in stated_before:
                updates[name] = old
        elif isinstance(new, Settings) and type(old) is type(new):
            updates[name] = _settled(old, new, stated_before, f"{key}.")
        elif _are_parts(old) and _are_parts(new):
            updates[name] = tuple(
                _settled(old[i], part, stated_before, f"{key}.{i}.")
                if i < len(old) and type(old[i]) is type(part) and old[i].name == part.name
                else part
                for i, part in enumerate(new)
            )
    return now.model_copy(update=updates)


def _are_parts(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(isinstance(part, Settings) and isinstance(part, _Part) for part in value)
    )


def _changes(
    before: Settings,
    now: Settings,
    progress_of: Callable[[str], Progress],
    progress: Progress,
    path: str,
) -> Iterator[Change]:
    for name, field in type(now).model_fields.items():
        old = getattr(before, name)
        new = getattr(now, name)
        if old == new:
            continue
        key = f"{path}{name}"
        extra = field.json_schema_extra
        may_change = extra in (ANY_TIME, COMPARED) or (
            extra == WHILE_RUNNING and progress.status == "running"
        )
        if _are_parts(old) and _are_parts(new):
            yield from _changes_of_parts(old, new, progress_of, f"{key}.")
        elif may_change:
            yield Change(key, old, new, _too_few(name, new, progress))
        elif isinstance(new, Settings) and type(old) is type(new):
            yield from _changes(old, new, progress_of, progress, f"{key}.")
        elif progress.status == "new":
            yield Change(key, old, new)
        else:
            yield Change(key, old, new, "it has shaped the weights so far")


def _changes_of_parts(
    before: tuple[Any, ...],
    now: tuple[Any, ...],
    progress_of: Callable[[str], Progress],
    path: str,
) -> Iterator[Change]:
    for i, new in enumerate(now):
        old = before[i] if i < len(before) else None
        progress = Progress("new") if old is None else progress_of(old.name)
        if old is None:
            yield Change(f"{path}{i}", None, new.name)
        elif type(old) is type(new) and old.name == new.name:
            of_part = _changes(old, new, progress_of, progress, f"{path}{i}.")
            if progress.status == "finished":
                of_part = (_of_finished(change, old.name) for change in of_part)
            yield from of_part
        else:
            has_begun = progress.status != "new"
            refusal = f"{old.name} is {progress.status} there" if has_begun else None
            yield Change(f"{path}{i}", old.name, new.name, refusal)
    for i in range(len(now), len(before)):
        yield Change(f"{path}{i}", before[i].name, None)


def _of_finished(change: Change, name: str) -> Change:
    if change.refusal is None:
        return change
    return Change(change.key, change.before, change.now, f"{name} is finished")


def _too_few(name: str, iterations: Any, progress: Progress) -> str | None:
    """Refuse to have done more iterations than there shall be."""
    if name == "iterations" and iterations < progress.num_done:
        return f"{progress.num_done} are done"
    return None


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Settings):
        return str(value.model_dump(mode="json", exclude_none=True))
    return f"{value:g}" if isinstance(value, float) else str(value)
