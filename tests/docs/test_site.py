"""The site builds without a warning, and its reference holds every public name and every room."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import twostep

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; `--strict` makes a broken link or an unreadable docstring a failure."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


@pytest.mark.slow
def test_every_public_name_has_its_entry(site: Path) -> None:
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name, (module, attribute) in twostep._HOMES.items():
        assert f"twostep.{name}</" in page or f"twostep.{name}<a" in page
        assert f"{module}.{attribute}" in page


@pytest.mark.slow
def test_every_room_has_its_page(site: Path) -> None:
    package = ROOT / "twostep"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.stem for path in package.glob("[!_]*.py")}
    pages = {path.parent.name for path in (site / "reference").glob("*/index.html")}
    assert pages == rooms
    page = (site / "reference" / "diffusion" / "index.html").read_text(encoding="utf-8")
    assert 'id="twostep.diffusion.grid.trailing_times"' in page


@pytest.mark.slow
def test_the_readme_is_the_home_page_and_its_links_lead_to_pages(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="results/"' in page
    assert 'src="gallery.jpg"' in page
    assert (site / "gallery.jpg").is_file()


@pytest.mark.slow
def test_the_search_finds_terms_and_functions(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"] for entry in index["docs"]}
    assert "glossary/#trailing-grid" in places
    assert "reference/diffusion/#twostep.diffusion.grid.trailing_times" in places
