"""Files that appear whole or not at all, whoever else writes them at the same time."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from twostep.errors import TwostepError
from twostep.files import (
    WriteError,
    alone_in,
    folder_atomically,
    remove_leftovers,
    write_atomically,
    write_new,
)


def test_a_written_file_appears_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    with write_atomically(path) as file:
        file.write(b"half")
        assert not path.exists()
        file.write(b" and half")
    assert path.read_bytes() == b"half and half"
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_reported_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(WriteError, match="disk is full"), write_atomically(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert issubclass(WriteError, TwostepError)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "below"
    complaint = r"below cannot be written .* give another place"
    with pytest.raises(WriteError, match=complaint), write_atomically(path):
        pytest.fail("the block must not be entered")


def test_a_long_name_leaves_room_for_that_of_the_partial_file(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    with write_atomically(path) as file:
        file.write(b"long")
    assert path.read_bytes() == b"long"


def test_nested_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with write_atomically(path) as outer:
        outer.write(b"outer")
        with write_atomically(path) as inner:
            inner.write(b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer"


def test_of_many_threads_one_complete_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "file"
    start = threading.Barrier(8)
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            start.wait()
            for _ in range(20):
                with write_atomically(path) as file:
                    for _ in range(100):
                        file.write(bytes([number]) * 100)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    written = path.read_bytes()
    assert len(written) == 10_000
    assert len(set(written)) == 1
    assert list(tmp_path.iterdir()) == [path]


def names(folder: Path) -> list[Path]:
    return [folder / "a.png", *(folder / f"a_{number}.png" for number in range(2, 100))]


def test_of_many_who_write_one_name_nobody_loses_anything(tmp_path: Path) -> None:
    contents = [bytes([number]) * 1000 for number in range(16)]
    start = threading.Barrier(len(contents))
    written: dict[bytes, Path] = {}

    def write(data: bytes) -> None:
        start.wait()
        written[data] = write_new(names(tmp_path), data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == contents
    assert all(path.read_bytes() == data for data, path in written.items())
    assert write_new(names(tmp_path), contents[3]) == written[contents[3]]
    assert len(list(tmp_path.iterdir())) == 16


def test_without_links_a_name_is_taken_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    paths = [write_new(names(tmp_path), data) for data in (b"one", b"two", b"one")]
    assert [path.name for path in paths] == ["a.png", "a_2.png", "a.png"]
    assert [path.read_bytes() for path in paths] == [b"one", b"two", b"one"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_appears_whole_or_not_at_all(is_there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "model"
    if is_there:
        folder.mkdir(parents=True)
        (folder / "mine").write_text("mine")
        (folder / "config").write_text("old")
    with pytest.raises(WriteError, match="disk is full"), folder_atomically(folder) as partial:
        (partial / "unet").mkdir()
        (partial / "unet" / "weights").write_text("half")
        raise OSError(28, "No space left on device")
    assert list((tmp_path / "new").iterdir()) == [folder] * is_there
    with folder_atomically(folder) as partial:
        (partial / "unet").mkdir()
        (partial / "unet" / "weights").write_text("whole")
        (partial / "config").write_text("new")
    assert (folder / "unet" / "weights").read_text() == "whole"
    assert (folder / "config").read_text() == "new"
    assert (folder / "mine").exists() == is_there
    assert list((tmp_path / "new").iterdir()) == [folder]


def test_a_folder_under_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WriteError, match="give another place"),
        folder_atomically(tmp_path / "file" / "below"),
    ):
        pytest.fail("the block must not be entered")


SAVE_A_PICTURE = """
import sys
from pathlib import Path
from PIL import Image
from twostep.contract import Contract
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import Request, Result

contract = Contract(
    name="nano-2step", role="student", steps=2, trained_times=(1000, 500),
    prediction_type="eps", spacing="trailing", guidance=1.0, sizes=((64, 64),), base="nano",
    lora_rank=None, lora_alpha=None, recipe="nano", version="0.1.0",
)
request = Request("a fox", seed=1, width=64, height=64, steps=2, guidance=1.0)
result = Result([Image.new("RGB", (64, 64))], [1], {}, [], contract, request)
(path,) = save_images(result, Path(sys.argv[1]))
assert path.is_file()
print([name for name in sys.modules if name == "torch" or name.startswith("torch.distributed")])
"""


def test_saving_a_picture_loads_no_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVE_A_PICTURE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_no_room_says_what_to_do(tmp_path: Path) -> None:
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some", errno.EFBIG: "raise the"}
    for number, words in advice.items():
        with pytest.raises(WriteError, match=words), write_atomically(tmp_path / "file"):
            raise OSError(number, "no room")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    """A killed process cannot tidy up after itself."""
    leftover = tmp_path / "model" / f"students.{'0a' * 8}.partial"
    (leftover / f"unet.{'1b' * 8}.partial").mkdir(parents=True)
    (leftover / "weights").write_text("half")
    (tmp_path / f"run.toml.{'2c' * 8}.partial").write_text("half")
    (tmp_path / "mine.partial").write_text("whole")
    mine = tmp_path / "another" / f"run.toml.{'3d' * 8}.partial"
    mine.parent.mkdir()
    mine.write_text("another process may be at it")
    remove_leftovers(tmp_path, within=("model",))
    with alone_in(tmp_path):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"model", "mine.partial", ".lock", "another", str(mine.relative_to(tmp_path))}


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_process_left_of_a_name_goes_when_it_is_written_again(
    is_folder: bool, tmp_path: Path
) -> None:
    """What a living one is at stays: it is locked."""
    path = tmp_path / "model [a]"
    abandoned = tmp_path / f"model [a].{'0a' * 8}.partial"
    of_others = tmp_path / f"another.{'0a' * 8}.partial"
    write = folder_atomically if is_folder else write_atomically
    for partial in (abandoned, of_others):
        partial.mkdir()
        (partial / "weights").write_text("half")
    (tmp_path / f"model [a].{'1b' * 8}.partial").write_text("half")
    (tmp_path / "model [a].mine.partial").write_text("whole")
    with write(path), write(path):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert [
        name for name in left if name.endswith((f"{'0a' * 8}.partial", f"{'1b' * 8}.partial"))
    ] == [of_others.name]
    assert len(left) == 4, "two of the living, another's, and one that nobody here has made"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        of_others.name,
        "model [a]",
        "model [a].mine.partial",
    ]


def test_what_fills_a_folder_that_is_not_yet_there_leaves_nothing_beside_it(
    tmp_path: Path,
) -> None:
    """Or whoever is killed then would leave what belongs to no name."""
    with folder_atomically(tmp_path / "model") as outer:
        with folder_atomically(outer) as inner:
            (inner / "weights").write_text("whole")
            assert [path.name for path in tmp_path.iterdir()] == [outer.name]
        assert [path.name for path in outer.iterdir()] == ["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_in_a_folder_that_is_not_yet_there_is_named_as_it_will_be(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with (
        pytest.raises(WriteError) as raised,
        folder_atomically(path) as partial,
        write_atomically(partial / "unet" / "weights"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(raised.value).startswith(f"{path / 'unet' / 'weights'} cannot be written (No space")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_one_process_own(tmp_path: Path) -> None:
    code = (
        "import sys; from twostep.files import alone_in, WriteError\n"
        "try:\n"
        "    with alone_in(sys.argv[1]): print('inside')\n"
        "except WriteError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with alone_in(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == (
        f"Another process is at work in {tmp_path}. Wait for it, or give another --out.\n"
    )
    third = subprocess.run(command, capture_output=True, text=True, check=True)
    assert third.stdout == "inside\n"
