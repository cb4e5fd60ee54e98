"""`make house` counts statements, whatever their layout, and who imports what."""

from pathlib import Path

import house

LAMP = '''"""What a lamp is."""

from twostep.errors import (
    Dark,
)

LIGHT = 1
"""How bright it is."""


def shine(power: float) -> float:
    """Return the light of a lamp."""
    if power > 1:
        raise Dark
    return (
        LIGHT
        * power
    )
'''


def tree(root: Path) -> Path:
    files = {
        "twostep/__init__.py": "",
        "twostep/errors.py": "class Dark(Exception):\n    pass\n",
        "twostep/media/__init__.py": "",
        "twostep/media/lamp.py": LAMP,
        "twostep/media/shade.py": "from twostep.media.lamp import shine\n",
        "examples/night.py": "def lazy():\n    from twostep import errors, media\n",
        "tests/test_night.py": "import twostep.media\n",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_statements_are_counted_without_docstrings_and_folds(tmp_path: Path) -> None:
    rooms = house.count_rooms(tree(tmp_path))
    assert rooms["media"].files == 3
    # The import, the constant, the function, its condition, its raise and its return; and the
    # import of the shade.
    assert rooms["media"].statements == 7
    assert rooms["errors"].statements == 2
    assert rooms["examples/"].statements == 2
    assert "tests/" not in rooms


def test_importers_are_files_of_other_rooms(tmp_path: Path) -> None:
    rooms = house.count_rooms(tree(tmp_path))
    assert rooms["media"].importers == {"examples/night.py"}
    assert rooms["errors"].importers == {"twostep/media/lamp.py", "examples/night.py"}


def test_the_table_shows_every_room_of_the_repository(root: Path) -> None:
    rooms = house.count_rooms(root)
    table = house.format_table(rooms)
    assert {"diffusion", "models", "benchmarks/", "comfyui/"} <= set(rooms)
    for name in rooms:
        if rooms[name].files:
            assert f"\n{name} " in table
