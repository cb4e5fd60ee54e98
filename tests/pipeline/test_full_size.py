"""The real SDXL architecture draws on a CPU within 20 GiB, from random weights and from a hub
cache; slow ones.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> str:
    """Run the benchmark in a process of its own, whose memory is what it measures; it fails over 20
    GiB.
    """
    command = [sys.executable, "benchmarks/full_size_generate.py", *arguments]
    told = {**os.environ, **environment}
    told.pop("OMP_NUM_THREADS", None)  # one thread is for tests that others run beside
    found = subprocess.run(command, cwd=ROOT, env=told, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def check(picture: Path, pixels: int) -> None:
    with Image.open(picture) as drawn:
        assert drawn.size == (pixels, pixels)
        assert len(drawn.getcolors(maxcolors=1 << 24)) > 1000


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize(("pixels", "steps"), [(512, 2), (1024, 1)])
def test_it_draws(pixels: int, steps: int, tmp_path: Path) -> None:
    picture = tmp_path / "drawn.png"
    said = run("draw", "--pixels", str(pixels), "--steps", str(steps), "--out", str(picture))
    assert "2,567,463,684 + 123,060,480 + 694,659,840 + 83,653,863 parameters" in said
    check(picture, pixels)


@pytest.mark.alone
@pytest.mark.slow
def test_the_official_name_loads_from_the_cache_and_draws(tmp_path: Path) -> None:
    with TemporaryDirectory() as hub:  # 6.9 GB, which pytest would keep
        run("write-cache", hub)
        picture = tmp_path / "drawn.png"
        offline = {"HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": "1"}
        said = run("draw", "--model", "ByteDance/SDXL-Lightning", "--out", str(picture), **offline)
    assert said.startswith("sdxl_lightning_2step_unet: 2,567,463,684 + ")
    check(picture, 512)
