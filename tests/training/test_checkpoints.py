"""Checkpoint files: whatever happens to their bytes is noticed, and nobody waits for them."""

import io
import random
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from twostep.training import run_folder
from twostep.training.checkpoints import (
    DamagedCheckpointError,
    copied_to_cpu,
    read_checkpoint,
    read_note,
    write_checkpoint,
)
from twostep.training.loop import LoopSettings
from twostep.training.run_folder import RunError, RunFolder

SETTINGS = LoopSettings(iterations=1, batch_size=1, learning_rate=1.0)


def state_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = {"a.weight": torch.randn(40, 7, generator=generator), "b": torch.arange(5)}
    return {"iteration": seed, "student": weights, "rates": [0.5, "x", None]}


def write(path: Path, seed: int) -> bytes:
    with path.open("wb") as file:
        write_checkpoint(file, state_of(seed), {"iteration": seed})
    return path.read_bytes()


def check_same(found: dict[str, Any], seed: int) -> None:
    expected = state_of(seed)
    weights = expected["student"]
    assert found["student"].keys() == weights.keys()
    assert all(torch.equal(found["student"][key], weights[key]) for key in weights)
    assert (found["iteration"], found["rates"]) == (expected["iteration"], expected["rates"])


def test_torch_and_zip_programs_read_it_too_and_the_note_is_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.pt", 3)
    check_same(read_checkpoint(tmp_path / "a.pt"), 3)
    check_same(torch.load(tmp_path / "a.pt", weights_only=True), 3)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    note = read_note(tmp_path / "a.pt")
    assert note.pop("digest")
    assert note == {"iteration": 3}


def damage(whole: bytes, how: str, luck: random.Random) -> bytes:
    """Bytes with one kind of damage somewhere."""
    place = luck.randrange(len(whole))
    changed = bytearray(whole)
    if how == "bit":
        changed[place] ^= 1 << luck.randrange(8)
    elif how == "byte":
        changed[place] = (changed[place] + luck.randrange(1, 256)) % 256
    elif how == "zeros":
        length = luck.randrange(16, 2000)
        changed[place : place + length] = bytes(len(changed[place : place + length]))
    elif how == "cut":
        del changed[place:]
    elif how == "gap":
        del changed[place : place + luck.randrange(1, 100)]
    elif how == "more":
        changed += bytes(luck.randrange(1, 100))
    return bytes(changed)


def check_noticed(path: Path, whole: bytes, how: str, luck: random.Random) -> None:
    path.write_bytes(damaged := damage(whole, how, luck))
    if damaged == whole:
        return
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(path)


@pytest.mark.parametrize("how", ["bit", "byte", "zeros", "cut", "gap", "more"])
def test_damage_is_noticed_wherever_it_is(how: str, tmp_path: Path) -> None:
    whole = write(tmp_path / "a.pt", 3)
    luck = random.Random(how)
    for _ in range(40):
        check_noticed(tmp_path / "a.pt", whole, how, luck)


def test_every_bit_of_the_note_counts(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.pt", 3)
    start = whole.rfind(b"twostep ")
    for place in range(start - 2, len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            (tmp_path / "a.pt").write_bytes(changed)
            with pytest.raises(DamagedCheckpointError):
                read_checkpoint(tmp_path / "a.pt")


@pytest.mark.slow
def test_five_hundred_flips_cuts_and_zero_blocks_are_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.pt", 3)
    luck = random.Random(0)
    for i in range(500):
        how = ("bit", "byte", "zeros", "cut", "gap")[i % 5]
        check_noticed(tmp_path / "a.pt", whole, how, luck)


def test_a_checkpoint_of_before_there_were_notes_is_read_and_its_tensors_are_checked(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.pt"
    torch.save(state_of(3), path)
    check_same(read_checkpoint(path), 3)
    whole = path.read_bytes()
    weights = state_of(3)["student"]["a.weight"].numpy().tobytes()
    changed = bytearray(whole)
    changed[whole.index(weights) + 100] ^= 1
    path.write_bytes(changed)
    # torch takes it as it is.
    torch.load(path, weights_only=True)
    with pytest.raises(DamagedCheckpointError, match="not what was written"):
        read_checkpoint(path)


def test_the_one_before_is_used_and_the_damaged_one_never_becomes_the_one_before(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    for seed in (2, 4, 6):
        folder.save("a", state_of(seed), keep=2)
    names = sorted(path.name for path in folder.checkpoint("a").parent.iterdir())
    assert names == ["a.000004.pt", "a.pt"]
    newest = folder.checkpoint("a")
    newest.write_bytes(damage(newest.read_bytes(), "bit", random.Random(1)))
    with pytest.warns(UserWarning, match=r"a\.pt is damaged .* a\.000004\.pt, is used"):
        kept = folder.load("a")
    assert kept is not None
    check_same(kept, 4)
    folder.save("a", state_of(6), keep=2)
    newest.write_bytes(b"")
    with pytest.warns(UserWarning, match="is used"):
        kept = folder.load("a")
    assert kept is not None
    check_same(kept, 4)


def test_where_all_are_damaged_nothing_is_guessed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    for seed in (2, 4):
        folder.save("a", state_of(seed), keep=2)
    for path in folder.checkpoint("a").parent.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"a\.pt is damaged .*a\.000002\.pt is damaged .* Delete it"):
        folder.load("a")


def test_one_that_nobody_examined_makes_room_for_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    folder.save("a", state_of(4), keep=2)
    folder.save("a", state_of(5), keep=2, examined=False)
    folder.save("a", state_of(6), keep=2, examined=False)
    newest, examined = folder.load("a"), folder.load("a", only_examined=True)
    assert newest is not None
    assert examined is not None
    assert (newest["iteration"], examined["iteration"]) == (6, 4)
    folder.save("a", state_of(8), keep=2)
    names = sorted(path.name for path in folder.checkpoint("a").parent.iterdir())
    assert names == ["a.000004.pt", "a.pt"]


def test_it_is_written_as_it_was_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    go_on = threading.Event()
    writers: list[str] = []

    def wait_and_write(file: io.BufferedWriter, state: dict[str, Any], note: Any) -> None:
        writers.append(threading.current_thread().name)
        assert go_on.wait(10)
        write_checkpoint(file, state, note)

    monkeypatch.setattr(run_folder, "write_checkpoint", wait_and_write)
    state = state_of(3)
    folder.save("a", state, later=True)
    assert not folder.checkpoint("a").exists()
    state["student"]["a.weight"].zero_()
    go_on.set()
    kept = folder.load("a")
    assert kept is not None
    check_same(kept, 3)
    assert writers[0] != threading.current_thread().name


def test_what_goes_wrong_meanwhile_is_told_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)

    def fill(file: object, state: object, note: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_checkpoint", fill)
    folder.save("a", state_of(3), later=True)
    with pytest.raises(RunError, match=r"a\.pt cannot be written .* disk is full"):
        folder.save("a", state_of(4), later=True)
    assert folder.load("a") is None


def test_a_copied_state_shares_nothing() -> None:
    state = {"a": [torch.zeros(2), (torch.ones(1), 3)], "b": {"c": 0.5}}
    copied = copied_to_cpu(state)
    state["a"][0].fill_(7)
    assert torch.equal(copied["a"][0], torch.zeros(2))
    assert copied["a"][1][1] == 3 and copied["b"] == {"c": 0.5}


def test_tensors_without_data_stay_where_shards_were() -> None:
    """A checkpoint of shards is written while training goes on, too."""
    state = {"shard": torch.empty(2, device="meta"), "whole": torch.ones(2)}
    copied = copied_to_cpu(state)
    assert copied["shard"].is_meta
    state["whole"].zero_()
    assert copied["whole"].tolist() == [1, 1]
