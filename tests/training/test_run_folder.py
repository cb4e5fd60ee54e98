"""Run folders: whole files or none, and no two recipes in one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twostep.training.loop import LoopSettings
from twostep.training.run_folder import RunError, RunFolder

SETTINGS = LoopSettings(iterations=1, batch_size=1, learning_rate=1.0)


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    assert folder.load("a") is None
    folder.save("a", {"iteration": 3, "weights": torch.arange(3)})
    kept = RunFolder(tmp_path / "run", SETTINGS).load("a")
    assert kept is not None
    assert kept["iteration"] == 3
    assert torch.equal(kept["weights"], torch.arange(3))


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", SETTINGS).save("a", {"iteration": 1})
    with pytest.raises(RunError, match="another recipe"):
        RunFolder(tmp_path / "run", SETTINGS.model_copy(update={"seed": 1}))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    folder.save("a", {"weights": torch.zeros(1000)})
    whole = folder.checkpoint("a").read_bytes()
    folder.checkpoint("a").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"a\.pt is damaged"):
        folder.load("a")


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    partial = folder.checkpoint("a").with_name("a.pt.0123.partial")
    partial.write_bytes(b"half")
    folder.save("a", {})
    RunFolder(tmp_path / "run", SETTINGS)
    assert not partial.exists()
    assert folder.checkpoint("a").exists()


def test_a_full_disk_is_told_and_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    folder.save("a", {"iteration": 3})

    def fill(state: object, file: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(RunError, match=r"a\.pt cannot be written .* disk is full"):
        folder.save("a", {"iteration": 4})
    assert folder.load("a") == {"iteration": 3}


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", SETTINGS)


def test_the_log_is_one_json_a_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    folder.log(part="a", loss=0.5)
    folder.log(part="a", loss=0.25)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [0.5, 0.25]


HOLD = """
import sys
from pathlib import Path
from twostep.training.run_folder import RunFolder
from twostep.training.loop import LoopSettings

folder = RunFolder(Path(sys.argv[1]), LoopSettings(iterations=1, batch_size=1, learning_rate=1.0))
print("here", flush=True)
sys.stdin.read()
"""


def test_two_processes_on_one_folder_are_told_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        with pytest.raises(RunError, match="Another process is at work in"):
            RunFolder(tmp_path / "run", SETTINGS)
        other.kill()
    RunFolder(tmp_path / "run", SETTINGS).save("a", {})


def test_whoever_is_killed_after_the_recipe_leaves_no_run_without_its_record(
    tmp_path: Path,
) -> None:
    """What the recipe states is known all the same once the run is called again."""
    RunFolder(tmp_path, SETTINGS)
    record = (tmp_path / "run.json").read_bytes()
    (tmp_path / "run.json").unlink()
    RunFolder(tmp_path, SETTINGS)
    assert (tmp_path / "run.json").read_bytes() == record


def test_what_was_logged_is_known_and_half_a_line_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, SETTINGS)
    assert not folder.has_logged(part="x")
    folder.log(part="x", iteration=4, picture="samples/x-000004.png")
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"part": "x", "iteration": 6, "pict')
    assert folder.has_logged(part="x", picture="samples/x-000004.png")
    assert not folder.has_logged(part="y", picture="samples/x-000004.png")
    assert not folder.has_logged(part="x", iteration=6)
