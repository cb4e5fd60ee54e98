"""Trackers: what the log says of an iteration, they are told; what is not installed is named."""

import gc
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from twostep.files import WriteError
from twostep.training import trackers
from twostep.training.loop import LoopSettings
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder
from twostep.training.trackers import track

from ..disks import mounted

SETTINGS = LoopSettings(iterations=1, batch_size=1, learning_rate=1.0)


def log_two_parts(folder: RunFolder) -> None:
    """What a run of two stages logs, the second of which counts from 1 again."""
    Image.new("RGB", (6, 4), "red").save(folder.path / "samples" / "a.png")
    folder.log(part="environment", machine="a")
    folder.log(part="8-mse", iteration=5, loss=0.5)
    folder.log(part="8-mse", iteration=10, loss=0.25, trouble="too red")
    folder.log(part="8-mse", iteration=10, picture="samples/a.png")
    folder.log(part="4-mse", iteration=1, loss=0.75)
    folder.log(part="4-mse", iteration=2, loss=0.625)


def test_tensorboard_is_told_every_figure_of_an_iteration_and_shown_the_pictures(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    track(folder, ("tensorboard",))
    log_two_parts(folder)
    read = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["8-mse/loss", "4-mse/loss"]
    assert [(event.step, event.value) for event in read.Scalars("8-mse/loss")] == [
        (5, 0.5),
        (10, 0.25),
    ]
    assert [event.step for event in read.Scalars("4-mse/loss")] == [1, 2]
    (picture,) = read.Images("8-mse/samples")
    assert (picture.step, picture.width, picture.height) == (10, 6, 4)


def test_a_full_disk_is_told_by_a_tracker_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS)
    with mounted(folder.path / "tensorboard", size=8192):
        track(folder, ("tensorboard",))
        with pytest.raises(WriteError, match=r"tensorboard cannot be written .* free some space"):
            for iteration in range(1000):
                folder.log(part="a" * 100, iteration=iteration, loss=0.5)
        # Its own thread still holds the file.
        del folder.listeners[:]
        gc.collect()


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of W&B: seven bytes, then a log in LevelDB's form.

    Each block of 32 KiB holds pieces with a sum, a length and a type: whole, first, middle, last.
    """
    place, whole = 7, b""
    while place < len(data):
        left_in_block = 2**15 - place % 2**15
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def read_wandb(data: bytes) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What was logged, row by row, and the axis of every figure."""
    from wandb.proto import wandb_internal_pb2

    rows, axes = [], {}
    for record_bytes in records(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(record_bytes)
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        if record.WhichOneof("record_type") == "metric" and record.metric.step_metric:
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return rows, axes


@pytest.mark.slow
def test_wandb_is_told_every_stage_by_its_own_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path / "run", SETTINGS)
    track(folder, ("wandb",))
    log_two_parts(folder)
    wandb.finish()
    (file,) = (folder.path / "wandb").glob("offline-run-*/run-*.wandb")
    # Another process of W&B's writes it, and may still be at it.
    for _ in range(100):
        rows, axes = read_wandb(file.read_bytes())
        if len(rows) == 5:
            break
        time.sleep(0.1)
    losses = [
        (row.get("8-mse/iteration"), row.get("8-mse/loss")) for row in rows if "8-mse/loss" in row
    ]
    assert losses == [(5, 0.5), (10, 0.25)]
    assert [row["4-mse/loss"] for row in rows if "4-mse/loss" in row] == [0.75, 0.625]
    assert [row["8-mse/samples/width"] for row in rows if "8-mse/samples/width" in row] == [6]
    assert axes["8-mse/*"] == "8-mse/iteration" and axes["4-mse/*"] == "4-mse/iteration"


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install wandb"):
        track(RunFolder(tmp_path / "run", SETTINGS), ("wandb",))


def test_a_folder_of_that_name_is_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "teapots").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not trackers._is_installed("teapots")
    assert trackers._is_installed("tensorboard")
