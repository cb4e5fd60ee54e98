"""The report: one page that holds the run, of a finished run, a running one and a killed one."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.distill.test_chain import LORAS
from twostep.distill import distil
from twostep.models.bundle import Bundle
from twostep.reports.run_page import write_report
from twostep.training.run_folder import RunError, RunFolder


class Outline(HTMLParser):
    """What is on a page: tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def run(teacher: Bundle, source: object, tmp_path: Path) -> Path:
    distil(
        LORAS, teacher, source, RunFolder(tmp_path / "run", LORAS), version="0", recipe_name="test"
    )
    return tmp_path / "run"


def test_one_page_holds_everything_and_needs_nothing(run: Path) -> None:
    path = write_report(run)
    page = Outline(path.read_text())
    titles = [text for text in page.texts if re.fullmatch(r"\d+(-\w+)+", text)]
    assert {stage.name for stage in LORAS.stages} <= set(titles)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(LORAS.stages)
    assert all(str(image).startswith("data:image/png;base64,") for image in images)
    fetched = [
        attributes.get("src") or attributes.get("href")
        for tag, attributes in page.tags
        if tag != "img"
    ]
    assert not any(fetched)
    assert "random-4step" in page.texts
    assert any('"lora_rank": 4' in text for text in page.texts)
    assert any("student_steps = 8" in text for text in page.texts)
    assert torch.__version__ in page.texts


def test_of_a_resumed_run_every_environment_is_shown_once(run: Path) -> None:
    lines = [
        {"part": "environment", "time": i, "machine": machine}
        for i, machine in enumerate(("a", "b", "a", "<b>"))
    ]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Outline(write_report(run).read_text())
    assert [text for text in page.texts if text in ("a", "b", "<b>")] == ["a", "b", "<b>"]


def test_curves_show_what_was_logged(run: Path) -> None:
    lines = [
        {
            "part": "8-adversarial-conditional-lora",
            "iteration": i,
            "gap": i / 10,
            "bad": float("nan"),
        }
        for i in (1, 2, 3)
    ]
    again = {"part": "8-adversarial-conditional-lora", "iteration": 2, "gap": 0.9}
    (run / "log.jsonl").write_text("\n".join(json.dumps(line) for line in [*lines, again]))
    page = Outline(write_report(run).read_text())
    assert "gap: 0.1 to 0.9, last 0.3" in page.texts
    (points,) = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in str(points).split()]
    assert heights[1] == 0.0 < heights[2] < heights[0]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", LORAS)
    page = Outline(write_report(tmp_path / "run").read_text())
    assert "0 / 1" in page.texts


def test_a_run_of_before_stages_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[[phases]]\nobjective = 'mse'\n")
    (tmp_path / "log.jsonl").write_text(json.dumps({"part": "8-mse", "iteration": 3, "loss": 0.5}))
    page = Outline(write_report(tmp_path).read_text())
    assert "8-mse" in page.texts and "3 / 3" in page.texts


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.toml"):
        write_report(tmp_path)
