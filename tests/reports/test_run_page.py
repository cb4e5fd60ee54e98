"""The report: one page that holds the run, of a finished run, a running one and a killed one."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.distill.conftest import Handful
from tests.distill.test_chain import LORAS
from twostep.distill import distil
from twostep.pretrain.model import random_bundle
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


def curves_of(page: Outline) -> list[dict[str, object]]:
    """What the page's charts are drawn from."""
    return next(json.loads(text) for text in page.texts if text.startswith("["))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; tests take a copy of it."""
    teacher = random_bundle()
    path = tmp_path_factory.mktemp("finished") / "run"
    folder = RunFolder(path, LORAS)
    distil(LORAS, teacher, Handful(teacher.text), folder, version="0", recipe_name="test")
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("run.lock"))


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
    assert curves_of(page) == [
        {
            "stage": "8-adversarial-conditional-lora",
            "figure": "gap",
            "x": [1, 2, 3],
            "runs": [{"name": "run", "y": [0.1, 0.9, 0.3]}],
        }
    ]


def test_several_runs_are_laid_over_each_other(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "<other>")
    for folder, values in ((run, {2: 0.5, 4: 0.25}), (other, {3: 0.125, 4: 0.0625})):
        lines = [{"part": "8-regression", "iteration": i, "loss": y} for i, y in values.items()]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Outline(write_report(run, [other]).read_text())
    assert curves_of(page) == [
        {
            "stage": "8-regression",
            "figure": "loss",
            "x": [2, 3, 4],
            "runs": [
                {"name": "run", "y": [0.5, None, 0.25]},
                {"name": "<other>", "y": [None, 0.125, 0.0625]},
            ],
        }
    ]
    assert "loss: run 0.25 to 0.5, last 0.25; <other> 0.0625 to 0.125, last 0.0625" in page.texts
    assert not (other / "report.html").exists()


def test_a_log_with_half_a_line_has_a_page_that_says_so(run: Path) -> None:
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-15] + b"\n[1]\n\xff\n")
    page = Outline(write_report(run).read_text())
    assert "3 of the lines of its log cannot be read, and are left out." in page.texts
    assert {stage.name for stage in LORAS.stages} <= set(page.texts)


@pytest.mark.slow
def test_in_a_browser_charts_have_axes_hover_zoom_and_a_logarithmic_scale(
    run: Path, tmp_path: Path
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here")
    other = shutil.copytree(run, tmp_path / "other")
    for folder, scale in ((run, 1.0), (other, 3.0)):
        lines = [
            {"part": "8-regression", "iteration": i, "loss": scale * 0.97**i}
            for i in range(10, 210, 10)
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = write_report(run, [other])
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url))
        page.goto(path.as_uri())
        problems.remove(path.as_uri())
        plot = page.locator(".chart .u-over")
        box = plot.bounding_box()
        assert plot.count() == 1
        read = "(name) => { const s = document.querySelector('.chart').plot.scales[name]; "
        read += "return [s.min, s.max]; }"
        assert page.evaluate(read, "x") == [10, 200]
        # Hovered in the middle, the legend has both runs' values at the nearest iteration.
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        legend = page.locator(".u-legend .u-value").all_inner_texts()
        iteration = int(legend[0])
        assert abs(iteration - 105) <= 10
        assert [float(text) for text in legend[1:]] == [
            pytest.approx(0.97**iteration, rel=1e-5),
            pytest.approx(3 * 0.97**iteration, rel=1e-5),
        ]
        # Dragged over the left half, that half is shown; a double-click shows all again.
        page.mouse.move(box["x"] + 1, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50, steps=5)
        page.mouse.up()
        low, high = page.evaluate(read, "x")
        assert (low, high) == (pytest.approx(10, abs=2), pytest.approx(105, abs=3))
        page.locator(".chart").locator("xpath=..").locator("input").check()
        assert page.evaluate("document.querySelector('.chart').plot.scales.y.distr") == 3
        assert page.evaluate(read, "x") == [low, high]
        page.locator(".chart .u-over").dblclick()
        assert page.evaluate(read, "x") == [10, 200]
        browser.close()
    assert problems == []


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", LORAS)
    page = Outline(write_report(tmp_path / "run").read_text())
    assert "0 / 1" in page.texts


def test_damaged_lines_that_are_json_all_the_same_are_counted(tmp_path: Path) -> None:
    RunFolder(tmp_path, LORAS)
    good = {"part": "4-regression", "iteration": 2, "student_loss": 0.5}
    damaged: list[object] = [
        None,
        [good],
        {"iteration": 2},
        {**good, "part": ["4-regression"]},
        {**good, "iteration": "2"},
        {**good, "iteration": None},
        {**good, "seconds_per_iteration": "1"},
    ]
    lines = [json.dumps(line) for line in [good, *damaged, {**good, "iteration": 3}]]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    page = Outline(write_report(tmp_path).read_text())
    said = f"{len(damaged)} of the lines of its log cannot be read, and are left out."
    assert said in page.texts
    assert [curve["x"] for curve in curves_of(page)] == [[2, 3]]


@pytest.mark.parametrize("recipe", ["stages = [", "stages = 3", "stages = [1]"])
def test_a_damaged_recipe_of_a_run_is_told(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(recipe)
    with pytest.raises(RunError, match="the recipe of this run cannot be read"):
        write_report(tmp_path)


def test_a_run_of_before_stages_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[[phases]]\nobjective = 'mse'\n")
    (tmp_path / "log.jsonl").write_text(json.dumps({"part": "8-mse", "iteration": 3, "loss": 0.5}))
    page = Outline(write_report(tmp_path).read_text())
    assert "8-mse" in page.texts and "3 / 3" in page.texts


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run\.toml"):
        write_report(tmp_path)
