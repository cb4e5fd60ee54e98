"""How large each room is and how many files import it: `make house`.

A statement is what Python executes as one: a line that is folded over five lines counts once, and
a docstring or a comment does not count. So the numbers say how much there is to understand, however
it is laid out. They are shown, and none of them is a target.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "twostep"
OUTSIDE = ("examples", "benchmarks", "comfyui")
"""Folders outside the package that use it; each is shown as one room."""


@dataclass
class Room:
    """What was counted of one room: a folder, or a module that stands alone in the package."""

    files: int = 0
    statements: int = 0
    importers: set[str] = field(default_factory=set)
    """Files of other rooms that import something of this one."""


def main() -> None:
    """Print a table of the rooms of the repository that this file lies in."""
    root = Path(__file__).resolve().parents[1]
    sys.stdout.write(format_table(count_rooms(root)) + "\n")


def count_rooms(root: Path) -> dict[str, Room]:
    """Count files, statements and importers of every room below `root`, the largest room first."""
    rooms: dict[str, Room] = defaultdict(Room)
    for path in python_files(root):
        relative = path.relative_to(root)
        name = room_of(relative)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        rooms[name].files += 1
        rooms[name].statements += count_statements(tree)
        for imported in imported_rooms(tree):
            if imported != name:
                rooms[imported].importers.add(str(relative))
    return dict(sorted(rooms.items(), key=lambda item: -item[1].statements))


def python_files(root: Path) -> Iterator[Path]:
    """Yield the Python files of the package and of the folders around it, tests excepted."""
    for folder in (PACKAGE, *OUTSIDE):
        yield from sorted((root / folder).rglob("*.py"))


def room_of(relative: Path) -> str:
    """Name the room of a file: twostep/models/bundle.py is in models, twostep/files.py in files."""
    if relative.parts[0] != PACKAGE:
        return f"{relative.parts[0]}/"
    if len(relative.parts) > 2:
        return relative.parts[1]
    return relative.stem


def count_statements(tree: ast.Module) -> int:
    """Count the statements of a module at every depth, without strings that stand alone."""
    return sum(isinstance(node, ast.stmt) and not is_bare_string(node) for node in ast.walk(tree))


def is_bare_string(node: ast.AST) -> bool:
    """Tell a docstring, or a string that describes the name above it, from a real statement."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def imported_rooms(tree: ast.Module) -> set[str]:
    """Collect the rooms of the package that a module imports, inside functions too."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            modules.update(f"{PACKAGE}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            modules.add(node.module)
    return {module.split(".")[1] for module in modules if module.startswith(f"{PACKAGE}.")}


def format_table(rooms: dict[str, Room]) -> str:
    """Lay the counts out in columns, with a row of totals."""
    rows = [
        f"{name:<12}{room.files:>6}{room.statements:>12}{len(room.importers):>13}"
        for name, room in rooms.items()
        if room.files
    ]
    files = sum(room.files for room in rooms.values())
    statements = sum(room.statements for room in rooms.values())
    heading = f"{'room':<12}{'files':>6}{'statements':>12}{'imported by':>13}"
    return "\n".join([heading, *rows, f"{'all':<12}{files:>6}{statements:>12}"])


if __name__ == "__main__":
    main()
