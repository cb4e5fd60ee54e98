"""The examples run as they are told to, with next to no training."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_in_two_dimensions_draws_and_prints(tmp_path: Path) -> None:
    picture = tmp_path / "toy2d.png"
    command = [sys.executable, "examples/toy2d.py", "--out", str(picture), "--effort", "0.005"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    rows = [line for line in found.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        *("teacher, 32 steps", "8 steps", "4 steps", "2 steps", "1 step")
    ]
    shares = [[float(cell.split("%")[0]) for cell in row.split("|")[2:4]] for row in rows[2:]]
    assert all(0 <= share <= 100 for row in shares for share in row)
    assert min(shares[0]) > 90  # the teacher is exact
    with Image.open(picture) as drawn:
        assert drawn.width > 1500
        assert len(drawn.getcolors(maxcolors=1 << 20)) > 20


@pytest.mark.slow
def test_the_gallery_shows_every_prompt_and_times_every_student(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "gallery.png"
    command = [sys.executable, "examples/gallery.py", "--out", str(picture)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(
        word in found.stdout for word in ("seconds per image", "speed-up", "1.0x", "nano-1step")
    )
    with Image.open(picture) as gallery:
        assert gallery.width > 4 * 128 and gallery.height > 12 * 128
