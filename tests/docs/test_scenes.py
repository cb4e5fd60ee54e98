"""What the page on scenes tells people to run."""

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_python_of_the_page_draws_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scenes.md").read_text(), re.S)
    exec(compile(block, "scenes.md", "exec"), {})
    shown = Image.open(ROOT / "docs/scenes.jpg").convert("RGB")
    drawn = Image.open(tmp_path / "scenes.png").resize(shown.size)
    difference = max(
        abs(ours - theirs)
        for ours, theirs in zip(
            drawn.resize((16, 16)).tobytes(), shown.resize((16, 16)).tobytes(), strict=True
        )
    )
    assert difference < 8  # levels of 255: the page has it as a JPEG
