"""Own pictures: every kind of source gives the same entries, cuts are right, and what cannot be
used says why.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from twostep.data.sources import (
    DataError,
    Demands,
    Entry,
    find_entries,
    read_picture,
)
from twostep.formats.contracts import sizes_around
from twostep.media.pictures import UnusablePictureError, crop_to_size, sharpness


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)


def test_a_folder_is_read_with_its_captions(pictures: Path) -> None:
    entries = list(find_entries(str(pictures)))
    assert [(entry.name, entry.caption) for entry in entries] == [
        ("0.png", "a red fox 0"),
        ("1.png", "a red fox 1"),
        ("2.png", "a red fox 2"),
        ("more/3.png", "a red fox 3"),
        ("more/4.png", "a red fox 4"),
    ]
    assert read_picture(entries[4], Demands()).size == (200, 100)


def test_lines_shards_and_datasets_give_what_the_folder_gives(
    pictures: Path, tmp_path: Path
) -> None:
    expected = list(find_entries(str(pictures)))
    lines = pictures / "all.jsonl"
    lines.write_text(
        "\n".join(json.dumps({"image": entry.name, "caption": entry.caption}) for entry in expected)
    )
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for number, entry in enumerate(expected):
            for ending, content in (("png", entry.read()), ("txt", str(entry.caption).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    hub = tmp_path / "hub"
    hub.mkdir()
    for number, entry in enumerate(expected):
        (hub / f"{number}.png").write_bytes(entry.read())
    (hub / "metadata.jsonl").write_text(
        "\n".join(
            json.dumps({"file_name": f"{i}.png", "text": entry.caption})
            for i, entry in enumerate(expected)
        )
    )
    for source in (str(lines), str(tmp_path / "shard-*.tar"), f"hf:{hub}", str(hub)):
        found = list(find_entries(source))
        assert [entry.caption for entry in found] == [entry.caption for entry in expected], source
        for entry, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(
                pixels(read_picture(entry, Demands())), pixels(read_picture(other, Demands()))
            )


def test_sources_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        list(find_entries(str(tmp_path)))
    with pytest.raises(DataError, match="is no folder"):
        list(find_entries(str(tmp_path / "nothing")))
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}\n{"picture": "b.png"}')
    _, second = find_entries(str(tmp_path / "a.jsonl"))
    assert second.name == "a.jsonl line 2"
    with pytest.raises(UnusablePictureError, match="no picture among picture: names for the pic"):
        read_picture(second, Demands())
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="no whole tar"):
        list(find_entries(str(tmp_path / "a.tar")))
    with pytest.raises(DataError, match="does not exist"):
        list(find_entries(str(tmp_path / "b-*.tar")))


def test_a_picture_stands_upright_on_white(draw: Callable[..., Image.Image]) -> None:
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(40, 20).save(turned, "PNG", exif=exif)
    assert read_picture(Entry("a", "x", turned.getvalue), Demands()).size == (20, 40)
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(clear, "PNG")
    assert read_picture(Entry("a", "x", clear.getvalue), Demands()).getpixel((4, 4)) == (
        255,
        255,
        255,
    )


@pytest.mark.parametrize(
    ("caption", "content", "demands", "reason"),
    [
        (None, None, Demands(), "no caption"),
        ("  ", None, Demands(), "no caption"),
        ("x", b"\x89PNG broken", Demands(), "cannot be read"),
        ("x", None, Demands(min_side=65), "64x64, smaller than 65"),
        ("x", None, Demands(min_sharpness=9.0), "sharpness is"),
    ],
)
def test_what_cannot_be_used_says_why(
    caption: str | None,
    content: bytes | None,
    demands: Demands,
    reason: str,
    draw: Callable[..., Image.Image],
) -> None:
    picture = draw(64, 64)
    with pytest.raises(UnusablePictureError, match=reason):
        read_picture(Entry("a", caption, lambda: picture if content is None else content), demands)


def test_blurring_lowers_the_sharpness(draw: Callable[..., Image.Image]) -> None:
    picture = draw(300, 200)
    blurred = picture.filter(ImageFilter.GaussianBlur(2))
    assert sharpness(blurred) < 0.2 * sharpness(picture)


def test_sizes_keep_the_area_and_hold_those_of_sdxl() -> None:
    sizes = sizes_around(1024, 64)
    assert sizes[0] == (1024, 1024)
    assert {(1152, 896), (1216, 832), (1344, 768), (896, 1152), (832, 1216), (768, 1344)} <= set(
        sizes
    )
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0
        assert 0.85 * 1024**2 < width * height <= 1024**2
        assert max(width, height) <= 2 * min(width, height)
    with pytest.raises(ValueError, match="32 px"):
        sizes_around(32, 64)


def test_a_cut_is_the_middle_of_the_nearest_shape() -> None:
    stripes = np.zeros((100, 300, 3), dtype=np.uint8)
    stripes[:, 100:200] = (255, 0, 0)
    found, told = crop_to_size(Image.fromarray(stripes), [(64, 64), (48, 80)])
    assert found.shape == (3, 64, 64)
    assert told == (100, 300, 0, 64, 64, 64)
    assert (found[0, :, 4:-4] > 0.9).all()
    assert (found[1:] < -0.9).all()
    upright, told = crop_to_size(Image.new("RGB", (50, 100)), [(64, 64), (48, 80), (80, 48)])
    assert upright.shape == (3, 80, 48)
    assert told == (100, 50, 8, 0, 80, 48)
