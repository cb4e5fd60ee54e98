"""Vector drawings: those that travel with the package, and what is rendered from them."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

from twostep.evaluate.attributes import STYLES, Concept
from twostep.pretrain.drawings import DrawingsError
from twostep.pretrain.icons import ICON_SETS
from twostep.pretrain.vectors import (
    MINI,
    VectorSet,
    collect_vectors,
    load_rendered,
    load_vectors,
    render_vectors,
    save_vectors,
)

FRAME = 'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"'
CORNER = f'<svg {FRAME}><rect width="4" height="4" fill="#ff0000"/></svg>'
WHOLE = f'<svg {FRAME}><rect width="8" height="8" fill="#0000ff"/></svg>'
CONCEPTS = (Concept("corner", "shape", ("corner",)), Concept("whole", "", ("whole", "square")))
SMALL = VectorSet({"red": (CORNER, WHOLE), "blue": (WHOLE, CORNER)}, CONCEPTS)


def test_mini_has_991_things_with_different_names_in_four_styles() -> None:
    vectors = load_vectors()
    names = [name for concept in vectors.concepts for name in concept.names]
    kinds = {concept.subgroup for concept in vectors.concepts}
    assert vectors.styles == STYLES
    assert len(vectors.concepts) == 991
    assert len(set(names) | kinds) == len(names) + len(kinds)
    assert vectors.digest == "f7ba5df714b38a28e3a87ea9648f8e98dbdd776d997169ca5f136c48b53eae47"


def test_mini_is_small() -> None:
    assert sum(path.stat().st_size for path in MINI.iterdir()) < 3_600_000


def test_a_set_comes_back_as_it_was(tmp_path: Path) -> None:
    save_vectors(SMALL, tmp_path)
    assert load_vectors(tmp_path) == SMALL


def test_vectors_are_collected_from_the_icon_sets(tmp_path: Path) -> None:
    """Archives as npm brings them; one icon is wider than its set's."""
    for number, package in enumerate(ICON_SETS.values()):
        icons = {
            "corner": {"body": f"<g>{number}</g>"},
            "whole": {"body": "<g/>", "width": 9},
            "another": {"body": "<g/>"},
        }
        content = json.dumps({"prefix": package, "width": 8, "height": 8, "icons": icons}).encode()
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as archive:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    vectors = collect_vectors(tmp_path, CONCEPTS)
    assert vectors.styles == STYLES
    assert vectors.documents["noto"][0] == f"<svg {FRAME}><g>2</g></svg>"
    assert 'viewBox="0 0 9 8"' in vectors.documents["3d"][1]
    with pytest.raises(DrawingsError, match="no 'fox'"):
        collect_vectors(tmp_path, (Concept("fox", "", ("fox",)),))


def test_drawings_are_rendered_in_the_order_of_concepts_and_styles() -> None:
    rendered = render_vectors(SMALL, 16)
    blue = torch.tensor([0, 0, 255, 255], dtype=torch.uint8)[:, None, None]
    assert rendered.drawings.shape == (2, 2, 4, 16, 16)
    assert (rendered.drawings[1, 0] == blue).all()
    assert (rendered.drawings[0, 1] == blue).all()
    for corner in (rendered.drawings[0, 0], rendered.drawings[1, 1]):
        assert corner[:, 0, 0].tolist() == [255, 0, 0, 255]
        assert corner[3].sum() == 255 * 64


def test_what_was_rendered_is_read_the_next_time(tmp_path: Path) -> None:
    seen: list[int] = []
    first = load_rendered(
        SMALL, 16, cache=tmp_path, on_drawing=lambda done, total: seen.append(done)
    )
    again = load_rendered(
        SMALL, 16, cache=tmp_path, on_drawing=lambda done, total: seen.append(done)
    )
    assert seen == [1, 2, 3, 4]
    assert torch.equal(first.drawings, again.drawings)
    assert again.concepts == CONCEPTS


def test_a_damaged_file_of_bitmaps_is_told(tmp_path: Path) -> None:
    load_rendered(SMALL, 16, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DrawingsError, match="Delete it"):
        load_rendered(SMALL, 16, cache=tmp_path)


@pytest.mark.parametrize("damage", ["a file cut off", "no file", "an icon missing"])
def test_a_damaged_folder_is_told(damage: str, tmp_path: Path) -> None:
    save_vectors(SMALL, tmp_path)
    path = tmp_path / "blue.json.xz"
    if damage == "a file cut off":
        path.write_bytes(path.read_bytes()[:60])
    elif damage == "no file":
        path.unlink()
    else:
        path.write_bytes((tmp_path / "red.json.xz").read_bytes()[:0])
    with pytest.raises(DrawingsError, match="are damaged"):
        load_vectors(tmp_path)


@pytest.mark.slow
def test_several_processes_render_the_same() -> None:
    vectors = load_vectors()
    some = VectorSet(
        {style: all_[:3] for style, all_ in vectors.documents.items()}, vectors.concepts[:3]
    )
    alone = render_vectors(some, 64, workers=1)
    together = render_vectors(some, 64, workers=2)
    assert torch.equal(alone.drawings, together.drawings)
