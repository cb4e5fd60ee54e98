"""`benchmarks/gpu.py`: parts that are done, cut off or put off, and all of it at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from PIL import Image

SCRIPT = Path(gpu.__file__)


def options_of(out: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(out), "--device", "cpu", *words])
    return gpu.parsed()


def test_a_part_that_takes_too_long_is_stopped_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, monkeypatch)
    monkeypatch.setitem(gpu.PARTS, "nano", gpu.Part(gpu.measure_nano, limit=0.2, least=0))
    for _ in range(2):
        # It has not even read its imports.
        assert gpu.run("nano", options, end=time.monotonic() + 60) == 0
    assert [line["what"] for line in gpu.lines_in(tmp_path / gpu.FIGURES)] == ["stopped"] * 2


def test_what_is_done_and_what_there_is_no_time_for_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tmp_path, monkeypatch)
    least = gpu.PARTS["train"].least
    assert gpu.run("train", options, end=time.monotonic() + least) == 0
    assert "too few" in capsys.readouterr().out
    assert not (tmp_path / gpu.FIGURES).exists()
    recorder = gpu.Recorder(tmp_path, "train")
    recorder.write("batch 16", seconds={"median": 1.5})
    assert recorder.has("batch 16")
    assert not gpu.Recorder(tmp_path, "train-bf16").has("batch 16")
    recorder.write(gpu.ENDED)
    assert gpu.run("train", options, end=time.monotonic() + 1000) == 0
    # A process that is killed while it writes leaves half a line.
    with (tmp_path / gpu.FIGURES).open("a") as file:
        file.write('{"part": "train", "wh')
    gpu.write_table(options)
    assert "| train | batch 16 | seconds median 1.5 |" in (tmp_path / gpu.TABLE).read_text()


def test_nano_is_compared_with_two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.Recorder(tmp_path, "nano").write("regression", iterations_a_second=30.0)
    options = options_of(tmp_path, monkeypatch, "--cpu-rate", "1.5")
    assert gpu.ratio_to_cpu("regression", gpu.done_in(tmp_path / gpu.FIGURES), options) == [
        "| nano | regression: times two cores of a CPU | 20.0 |"
    ]
    gpu.Recorder(tmp_path, "nano-cpu").write("regression", iterations_a_second=2.0)
    options = options_of(tmp_path, monkeypatch)
    assert gpu.ratio_to_cpu("regression", gpu.done_in(tmp_path / gpu.FIGURES), options) == [
        "| nano | regression: times two cores of a CPU | 15.0 |"
    ]


@pytest.mark.slow
def test_it_is_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    command += ["--seconds", "3000", "--engines", "eager", "--compiled", str(tmp_path / "compiled")]
    parts = ["start", "draw-1", "train", "train-bf16", "nano", "bench", "draw-4", "nano-cpu"]
    ended = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    done = gpu.done_in(tmp_path / gpu.FIGURES)
    assert {(part, gpu.ENDED) for part in parts} <= done.keys()
    assert done["start", "eager"]["whole_start"] > done["start", "eager"]["first_picture"] > 0
    for part in ("draw-1", "draw-4"):
        rows = done[part, "up to eager"]["rows"]
        assert list(rows) == ["diffusers", "eager", "eager:tiny"]
        for stages in rows.values():
            assert all(stages[stage]["median"] > 0 for stage in ("picture", "unet", "decode"))
        levels = done[part, "differences"]["levels"]
        assert levels["eager"] < 0.5 < levels["eager:tiny"]
        with Image.open(tmp_path / f"{part}.png") as drawn:
            assert drawn.size == (3 * 64, 64)
    for part, batch in (("train", 4), ("train", 2), ("train-bf16", 2)):
        work = done[part, "arithmetic"]
        figures = done[part, f"batch {batch}"]
        reached = work["tflop_of_example"] * figures["examples_a_second"] / work["product_tflops"]
        assert figures["utilisation"] == pytest.approx(reached)
    assert ("train-bf16", "batch 4") not in done
    # The teacher's two steps with guidance, and the student's with its way back.
    assert done["train", "arithmetic"]["tflop_of_example"] == pytest.approx(1.3e-3, rel=0.2)
    assert done["nano", "lightning"]["stage"] == "8-lightning-conditional"
    rows = done["bench", "2 steps, 64x64, batch 1"]["rows"]
    assert {row["name"] for row in rows} >= {"eager", "diffusers", "arithmetic alone"}
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")
    table = (tmp_path / gpu.TABLE).read_text()
    assert "lightning: times two cores of a CPU" in table
    # Once more: everything is there, and the table is the same but for the machine's load.
    again = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True)
    assert again.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / gpu.FIGURES).read_text().splitlines()]
    assert [line["part"] for line in lines].count("machine") == 2
    assert len({(line["part"], line["what"]) for line in lines}) == len(lines) - 1
