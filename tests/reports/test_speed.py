"""Timings are paired and right, the plot shows them to scale, and everything takes its turn."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twostep.cli import app
from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.reports.genai import has_genai
from twostep.reports.speed import (
    PROMPT,
    Case,
    Row,
    SpeedError,
    Timing,
    _timed,
    compare_speed,
    count_operations,
    plot,
)
from twostep.reports.starts import _run

CASE = Case(2, (64, 64), 2)


def row(name: str, *seconds: float) -> Row:
    return Row(name, CASE, {"total": Timing(seconds)})


def test_ratios_are_of_the_same_rounds() -> None:
    slow = row("slow", 4.0, 2.0, 6.0, 8.0, 10.0)
    fast = row("fast", 1.0, 1.0, 2.0, 2.0, 2.0)
    assert slow.total.median == 6.0
    assert slow.total.quartiles == (4.0, 8.0)
    assert fast.times_as_fast_as(slow).seconds == (4.0, 2.0, 3.0, 4.0, 5.0)
    assert fast.times_as_fast_as(slow).median == 4.0
    assert Timing((3.0,)).as_json() == {"median": 3.0, "low": 3.0, "high": 3.0}


def test_everything_takes_its_turn_and_the_first_rounds_do_not_count() -> None:
    turns: list[str] = []

    def draw_of(name: str):
        def draw(seed: int) -> dict[str, float]:
            turns.append(f"{name}{seed}")
            return {"decode": float(seed)} if name == "a" else {}

        return draw

    first, second = _timed({"a": draw_of("a"), "b": draw_of("b")}, CASE, 3)
    assert turns == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3", "a4", "b4"]
    assert list(first.stages) == ["decode", "total"]
    assert first.stages["decode"].seconds == (2.0, 3.0, 4.0)
    assert list(second.stages) == ["total"]
    assert len(second.total.seconds) == 3


def test_a_plot_is_to_scale() -> None:
    drawn = plot([row("slow", 0.4, 0.4), row("fast", 0.1, 0.1)])
    wide = [float(each) for each in re.findall(r'<rect x="190" y="\d+" width="([\d.]+)"', drawn)]
    assert wide[0] == pytest.approx(4 * wide[1], rel=1e-2)
    # Milliseconds of a picture, of which there are two in a batch.
    assert re.findall(r">([\d.]+ ms)<", drawn) == ["200.0 ms", "50.0 ms"]
    assert "2 steps, 64x64, batch 2" in drawn


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(SpeedError, match="at least one engine"):
        compare_speed("nano", engines=[], cases=[CASE], rounds=1)


@pytest.mark.slow
def test_bench_compares_eager_with_diffusers(tmp_path: Path) -> None:
    words = ["bench", "--engine", "eager", "--steps", "2", "--rounds", "2", "--starts", "1"]
    answer = CliRunner().invoke(app, [*words, "-o", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    found = json.loads((tmp_path / "speed.json").read_text())
    others = ["diffusers", *(["OpenVINO GenAI"] if has_genai() else []), "arithmetic alone"]
    assert [each["name"] for each in found["rows"]] == ["eager", *others]
    assert found["rows"][-1]["seconds"]["total"]["median"] > 0
    stages = found["rows"][0]["seconds"]
    parts = sum(stages[stage]["median"] for stage in ("text", "encode", "denoise", "decode"))
    assert 0.3 * stages["total"]["median"] < parts <= 1.3 * stages["total"]["median"]
    torch, eager = found["starts"]
    assert (torch["name"], eager["name"]) == ("import torch", "eager")
    assert 50e6 < torch["peak_bytes"] < eager["peak_bytes"] < 2e9
    assert (tmp_path / "speed.svg").read_text().startswith("<svg")
    assert not (tmp_path / "curves.svg").exists()  # of one case


@pytest.mark.slow
def test_operations_are_those_of_denoiser_and_decoder() -> None:
    studio = Studio(device="cpu")

    def count(steps: int, batch: int) -> int:
        request = Request(PROMPT, model="nano", steps=steps, num_images=batch)
        return count_operations(studio.load(request), request)

    one_step, two_steps, four_steps = (count(steps, 1) for steps in (1, 2, 4))
    denoiser = two_steps - one_step
    assert denoiser > 0
    assert four_steps == two_steps + 2 * denoiser
    assert count(2, 3) == 3 * two_steps


def test_a_command_that_fails_is_told_with_its_last_line() -> None:
    with pytest.raises(SpeedError, match="failed: no such thing"):
        _run([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    seconds, peak = _run([sys.executable, "-c", "print(1)"])
    assert 0 < seconds < 60
    assert 1e6 < peak < 1e9
