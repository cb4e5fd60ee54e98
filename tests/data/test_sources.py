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
    Columns,
    DataError,
    Demands,
    Entry,
    Findings,
    find_all_entries,
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


PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def found(source: object, **options: object) -> dict[str, tuple[str, ...]]:
    return {entry.name: entry.captions for entry in find_entries(str(source), **options)}


@pytest.mark.parametrize("prefix", ["", "./", "set.v1/", "./a/b.c/"])
def test_names_in_shards_may_have_dots_and_folders(prefix: str, tmp_path: Path) -> None:
    png = PNG.getvalue()
    members = {
        f"{prefix}1.png": png,
        f"{prefix}1.txt": b"a",
        f"{prefix}2.v2.JPG": png,
        f"{prefix}2.v2.caption": b"b",
        f"{prefix}3.seg.png": png,
        f"{prefix}3.json": b'{"caption": ["c", "d"]}',
        f"{prefix}4.png": png,
        f"{prefix}4.json": b'{"caption": "half',
        f"{prefix}5.png": png,
        f"{prefix}5.json": b'"e"',
    }
    write_tar(tmp_path / "x.tar", members)
    start = f"x.tar/{prefix.removeprefix('./')}"
    assert found(tmp_path / "x.tar") == {
        f"{start}1": ("a",),
        f"{start}2.v2": ("b",),
        f"{start}3.seg": ("c", "d"),
        f"{start}4": (),
        f"{start}5": ("e",),
    }


def test_shards_come_as_folders_patterns_ranges_and_compressed(tmp_path: Path) -> None:
    for number in range(8, 12):
        content = {"1.png": PNG.getvalue(), "1.txt": str(number).encode()}
        write_tar(tmp_path / f"{number:03d}.tar", content)
    write_tar(tmp_path / "z.tar.gz", {"1.png": PNG.getvalue(), "1.txt": b"z"}, "w:gz")
    assert found(tmp_path / "z.tar.gz") == {"z.tar.gz/1": ("z",)}
    assert list(found(tmp_path / "{009..011}.tar")) == ["009.tar/1", "010.tar/1", "011.tar/1"]
    assert len(found(tmp_path / "0*.tar")) == 4
    assert len(found(tmp_path)) == 5


def test_a_shard_that_is_cut_off_breaks_no_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": PNG.getvalue() * 20, "1.txt": b"x"})
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    first, second = find_entries(str(tmp_path / "*.tar"))
    assert (first.name, second.name) == ("a.tar", "b.tar/1")
    assert "no whole tar" in str(first.problem) and second.problem is None


def test_captions_lie_beside_pictures_in_several_ways(tmp_path: Path) -> None:
    for name in ("a.png", "b.jfif", "c.gif", "d.png"):
        (tmp_path / name).write_bytes(PNG.getvalue())
    (tmp_path / "a.txt").write_bytes("café".encode("utf-16"))
    (tmp_path / "b.caption").write_text("b")
    (tmp_path / "c.txt").write_text("c")
    (tmp_path / "c.caption").write_text("another c")
    (tmp_path / "d.txt").write_bytes("一个红苹果".encode("gbk"))
    for name in ("x.heic", "y.heic", "z.mp4", ".hidden.heic", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    findings = Findings()
    assert found(tmp_path, findings=findings) == {
        "a.png": ("café",),
        "b.jfif": ("b",),
        "c.gif": ("c", "another c"),
        "d.png": (),
    }
    assert findings.other_files == {".heic": 2, ".mp4": 1}
    *_, last = find_entries(str(tmp_path))
    assert "in no encoding that is known" in str(last.problem)


def test_endings_of_captions_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("A.JPG", "b.png"):
        (tmp_path / name).write_bytes(PNG.getvalue())
    (tmp_path / "A.TXT").write_text("a fox")
    (tmp_path / "A.Caption").write_text("a red fox")
    (tmp_path / "b.TXT").write_text("in capitals")
    (tmp_path / "b.txt").write_text("a bird")
    assert found(tmp_path) == {"A.JPG": ("a fox", "a red fox"), "b.png": ("a bird",)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("A.JPG", "A.TXT"):
            tar.add(tmp_path / name, name)
    assert found(tmp_path / "x.tar") == {"x.tar/A": ("a fox",)}


def test_hidden_members_of_a_shard_are_left_out(tmp_path: Path) -> None:
    """As macOS packs them: `._x` beside each x, with what its file system knows of it."""
    (tmp_path / "a.png").write_bytes(PNG.getvalue())
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "._a").write_bytes(b"\0\5\x16\7")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            tar.add(tmp_path / "._a", f"./set/._{name}")
            tar.add(tmp_path / name, f"./set/{name}")
    assert found(tmp_path / "x.tar") == {"x.tar/set/a": ("a fox",)}


def test_tables_lie_in_subfolders_too(tmp_path: Path) -> None:
    """As Hugging Face's folders of pictures have them, one for each split."""
    for name in ("train/a.png", "train/deep/b.png", "train/c.png", "test/d.png", "e.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG.getvalue())
    (tmp_path / "train" / "metadata.csv").write_text(
        "file_name,text\na.png,a\ndeep/b.png,b\n,lost\n"
    )
    (tmp_path / "train" / "deep" / "metadata.jsonl").write_text("not read")
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "./d.png", "text": "d"}')
    (tmp_path / "e.txt").write_text("e")
    findings = Findings()
    assert found(tmp_path, findings=findings) == {
        "test/d.png": ("d",),
        "train/a.png": ("a",),
        "train/deep/b.png": ("b",),
        "train/metadata.csv line 4": (),
        "e.png": ("e",),
    }
    assert findings.unlisted == {"train/metadata.csv": 1}
    entries = {entry.name: entry for entry in find_entries(str(tmp_path))}
    assert all(entries[name].read() == PNG.getvalue() for name in ("test/d.png", "e.png"))


def test_a_row_whose_caption_is_no_text_is_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG.getvalue())
    (tmp_path / "m.jsonl").write_text(
        '{"image": "a.png", "text": 7}\n{"image": "a.png", "text": NaN}\n'
        '{"image": "a.png", "text": "a fox"}\n{"image": "a.png", "text": NaN, "prompt": "b"}'
    )
    entries = list(find_entries(str(tmp_path / "m.jsonl")))
    assert [entry.captions for entry in entries] == [(), (), ("a fox",), ("b",)]
    assert [entry.problem for entry in entries] == [
        "of its caption, it is 7, which is no text",
        None,
        None,
        None,
    ]
    with pytest.raises(UnusablePictureError, match="no caption"):
        read_picture(entries[1], Demands())


def test_json_in_a_shard_that_is_nested_too_deep_breaks_one_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG.getvalue())
    (tmp_path / "a.json").write_text("[" * 100_000)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "a.json"):
            tar.add(tmp_path / name, name)
    (entry,) = find_entries(str(tmp_path / "x.tar"))
    assert "it is no JSON" in str(entry.problem)


def test_linked_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(PNG.getvalue())
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path / "real")
    (folder / "sub" / "circle").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list(found(folder)) == ["gone.png", "linked/a.png"]
    assert found(folder)["linked/a.png"] == ()


def test_tables_name_their_columns_and_a_flag_names_others(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("img,file_name,text,prompt\nx.png,a.png,,a fox\n")
    assert found(tmp_path) == {"a.png": ("a fox",)}
    columns = Columns(image=("img",), caption=("text",))
    assert found(tmp_path / "metadata.csv", columns=columns) == {"x.png": ()}
    (tmp_path / "b.jsonl").write_text(
        '{"image": "a.png", "caption": ["x", "y"]}\n{"image": "a.png", "caption": "z"}\n'
    )
    assert found(tmp_path / "b.jsonl") == {"a.png": ("x", "y"), "a.png#2": ("z",)}


def test_weights_are_of_folders_and_of_kohyas_names(tmp_path: Path) -> None:
    for name in ("10_fox/a.png", "10_fox/deep/b.png", "2_bird/c.png"):
        (tmp_path / "k" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "k" / name).write_bytes(PNG.getvalue())
    findings = Findings()
    weights = {"10_fox/deep": 0.5, "10": 7.0}
    entries = find_entries(str(tmp_path / "k"), weights=weights, findings=findings)
    assert [(entry.name, entry.weight) for entry in entries] == [
        ("10_fox/a.png", 10.0),
        ("10_fox/deep/b.png", 5.0),
        ("2_bird/c.png", 2.0),
    ]
    assert findings.repeats == {"10_fox": 10, "2_bird": 2}
    # One picture beside such folders, and they are names as any others.
    (tmp_path / "k" / "d.png").write_bytes(PNG.getvalue())
    assert {entry.weight for entry in find_entries(str(tmp_path / "k"))} == {1.0}


def test_several_sources_keep_their_names_apart(tmp_path: Path) -> None:
    for name in ("x/fox", "y/fox", "bird"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(PNG.getvalue())
    sources = [str(tmp_path / name) for name in ("x/fox", "bird", "y/fox")]
    entries = list(find_all_entries(sources, weights={"bird": 3.0}))
    assert [(entry.name, entry.weight) for entry in entries] == [
        ("fox/a.png", 1.0),
        ("bird/a.png", 3.0),
        ("fox#2/a.png", 1.0),
    ]


def test_a_dataset_with_nulls_and_broken_pictures_keeps_the_rest(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [{"bytes": PNG.getvalue(), "path": None}, None, {"bytes": b"x", "path": None}],
        "text": ["a", "b", None],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "data.parquet"))
    first, second, third = find_entries(f"hf:{tmp_path}")
    assert read_picture(first, Demands()).getpixel((0, 0)) == (255, 0, 0)
    assert second.problem == "its picture is missing"
    with pytest.raises(UnusablePictureError, match="no caption"):
        read_picture(third, Demands())
