"""The live page in a real browser: it draws while one types, and everything is reached by keys."""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from tests.serve.conftest import APPLE, GatedStudio, listening
from twostep.cli import app as cli
from twostep.media.audio import LEVELS, read_sound
from twostep.media.clip import read_clip
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import Control, Picture, Request
from twostep.pipeline.studio import Studio
from twostep.serve.gate import Rules
from twostep.serve.page_routes import PAGE_FILES

_PIXELS = """async () => {
    const image = document.getElementById("picture");
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
}"""
"""Reads the picture that is shown, as RGBA."""


def test_the_page_is_served_and_fetches_from_nowhere_else(client: TestClient) -> None:
    for address, (_, kind) in PAGE_FILES.items():
        answer = client.get(address)
        assert answer.headers["content-type"].startswith(kind)
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
        for elsewhere in ("http://", "https://", "cdn"):
            assert elsewhere not in answer.text


WIDE = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


@contextmanager
def browsing(address: str, **options: Any) -> Iterator[Any]:
    """Open the page at an address in a browser, and let nothing go wrong there."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        permissions = ["clipboard-read", "clipboard-write"]
        context = browser.new_context(permissions=permissions, **{"viewport": WIDE} | options)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a machine may have much else to do
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda message: message.type == "error" and page.problems.append(message.text),
        )
        page.goto(address)
        yield page
        assert page.problems == []
        browser.close()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    with browsing(address) as page:
        ready(page)
        yield page


def ready(page: Any) -> None:
    """Wait until the page knows what the server can do."""
    until(page, "document.querySelector('#steps input') !== null")


def until(page: Any, condition: str) -> None:
    """Wait until something is so; the page's policy forbids what Playwright has for that."""
    end = time.monotonic() + 120
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def drawn(page: Any) -> None:
    """Wait until what is wished last is shown."""
    until(
        page,
        "document.getElementById('main').ariaBusy === 'false'"
        " && document.getElementById('picture').alt === document.getElementById('prompt').value"
        " && document.getElementById('status').textContent.startsWith('Drawn')",
    )


def changed_after(page: Any, act: Callable[[], object]) -> None:
    """Do something, and wait until another picture is shown."""
    before = page.locator("#picture").get_attribute("src")
    act()
    until(page, f"document.getElementById('picture').src !== {json.dumps(before)}")
    drawn(page)


def pixels(page: Any) -> bytes:
    """Return the picture that is shown, as RGBA."""
    return bytes(page.evaluate(_PIXELS))


def stroke(page: Any, *points: tuple[float, float]) -> None:
    """Paint through points of the canvas, which are shares of its width and height."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def written(page: Any, kind: str) -> str:
    """Copy what was drawn in some form, and return it."""
    page.evaluate("document.getElementById('status').textContent = ''")
    page.locator(f"[data-copy={kind}]").click()
    until(page, "document.getElementById('status').textContent.startsWith('Copied')")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def assert_accessible(page: Any) -> None:
    """Let axe look at the page as it stands."""
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


@pytest.mark.slow
def test_typing_draws_and_not_at_every_key(page: Any) -> None:
    posted: list[str] = []
    page.on("request", lambda each: each.method == "POST" and posted.append(each.url))
    page.locator("#prompt").press_sequentially((APPLE + " " * 40)[:40], delay=60)
    drawn(page)
    # How many exactly is a matter of speed; test_turns.py has the law, with a clock of its own.
    assert 1 <= len(posted) < 40
    page.wait_for_timeout(1000)
    assert page.locator("#history li").count() == 1
    assert page.locator("#caption").inner_text().startswith("nano-2step, 64 × 64")
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 64


@pytest.mark.slow
def test_what_a_student_cannot_is_locked_and_the_teacher_draws_beside(page: Any) -> None:
    page.locator("#prompt").fill(APPLE)
    drawn(page)
    assert page.locator("#guidance").is_disabled()
    assert "student" in page.locator("#why").inner_text()
    page.locator("#steps [value='32']").press("Space")
    until(page, "document.getElementById('caption').textContent.startsWith('nano,')")
    assert page.locator("#guidance").is_enabled()
    assert page.locator("#compare").is_hidden()

    # Back at a student, the teacher draws from the same noise.
    page.locator("#steps [value='1']").press("Space")
    until(page, "document.getElementById('caption').textContent.startsWith('nano-1step')")
    page.get_by_role("button", name="Compare with the teacher").click()
    until(page, "!document.getElementById('beside').hidden")
    assert "32 steps" in page.locator("#reference-caption").inner_text()
    text = written(page, "python")
    assert (
        f'twostep.Request(\n    "{APPLE}",\n    model="nano",\n    steps=1,\n    seed=1,\n)' in text
    )


@pytest.mark.slow
def test_a_picture_restores_everything_and_others_are_begun_with(
    page: Any, address: str, tmp_path: Path
) -> None:
    import twostep

    with twostep.Client(address) as client:
        made = client.draw(twostep.Request("a cat", steps=4, seed=11)).files[0]
    path = tmp_path / "made.png"
    path.write_bytes(made)
    page.locator("#file").set_input_files(path)
    drawn(page)
    assert page.locator("#prompt").input_value() == "a cat"
    assert page.locator("#seed").input_value() == "11"
    assert page.locator("#steps :checked").get_attribute("value") == "4"
    # The same wish gives the same picture.
    assert pixels(page) == Image.open(BytesIO(made)).convert("RGBA").tobytes()

    Image.new("RGB", (64, 64), "green").save(tmp_path / "plain.png")
    changed_after(page, lambda: page.locator("#file").set_input_files(tmp_path / "plain.png"))
    assert page.locator("#begun").is_visible()
    # The strengths are those that the student was trained at.
    assert page.locator("#strength").get_attribute("max") == "3"
    page.locator("#strength").fill("1")
    assert page.locator("#strength").get_attribute("aria-valuetext") == "50 %, 2 steps"


@pytest.mark.slow
def test_canvas_mask_and_controlnet_are_drawn_from_saved_and_restored(
    page: Any, tmp_path: Path
) -> None:
    page.locator("#prompt").fill(APPLE)
    drawn(page)
    page.get_by_role("button", name="Sketch one").click()
    page.locator("#width").fill("20")
    changed_after(page, lambda: stroke(page, (0.3, 0.3), (0.6, 0.6)))
    page.get_by_role("radio", name="Where it changes").press("Space")
    changed_after(page, lambda: stroke(page, (0.2, 0.75), (0.8, 0.75)))
    page.get_by_role("button", name="Add a ControlNet").click()
    changed_after(page, lambda: stroke(page, (0.5, 0.6), (0.5, 0.8)))
    # Above the mask the sketch itself is left: white paper in the corner.
    assert pixels(page)[:4] == b"\xff\xff\xff\xff"
    first = pixels(page)

    # The same by keys: the brush goes down in the middle and 3 steps to the right.
    canvas = page.locator("#canvas")
    canvas.focus()
    for key in ("Space", "Shift+ArrowRight"):
        canvas.press(key)
    changed_after(page, lambda: canvas.press("Space"))
    assert pixels(page) != first
    changed_after(page, lambda: canvas.press("Control+z"))
    assert pixels(page) == first
    page.get_by_role("button", name="Redo").click()
    drawn(page)
    changed_after(page, lambda: page.get_by_role("button", name="Undo").click())

    with page.expect_download() as saved:
        page.locator("#download").click()
    path = tmp_path / "saved.png"
    saved.value.save_as(path)
    again = Image.open(path)
    again.load()  # texts may stand behind the pixels
    assert {"twostep", "twostep-inputs"} <= set(again.info)
    assert again.convert("RGBA").tobytes() == first

    # The commands that are copied draw the same.
    names = ["image.png", "mask.png", "control-1.png"]
    command = written(page, "cli")
    assert page.locator("#inputs li").all_inner_texts() == names
    for name in names:
        with page.expect_download() as saved:
            page.get_by_role("link", name=name).click()
        saved.value.save_as(tmp_path / name)
    words = shlex.split(command)
    assert words[:4] == ["twostep", "edit", APPLE, "image.png"]
    with chdir(tmp_path):
        done = CliRunner().invoke(cli, [*words[1:], "--out", "out"])
        assert done.exit_code == 0, done.output
        (drawn_again,) = (tmp_path / "out").glob("*.png")
    assert Image.open(drawn_again).convert("RGBA").tobytes() == first
    script = written(page, "python")
    with chdir(tmp_path):
        exec(compile(script.replace('"out"', '"out2"'), "copied", "exec"), {})
    (drawn_again,) = (tmp_path / "out2").glob("*.png")
    assert Image.open(drawn_again).convert("RGBA").tobytes() == first
    script = written(page, "curl")
    subprocess.run(["sh", "-c", script], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "picture.png").convert("RGBA").tobytes() == first
    graph = json.loads(written(page, "workflow"))
    assert {"ControlNetLoader", "LoadImage"} <= {node["type"] for node in graph["nodes"]}
    assert page.locator("#inputs li").count() == 3

    # A fresh page restores it from the file, with all that went in.
    page.reload()
    ready(page)
    page.locator("#file").set_input_files(path)
    drawn(page)
    assert page.locator("#controls li").count() == 1
    assert pixels(page) == first


@pytest.mark.slow
def test_pictures_that_went_in_are_known_by_their_hash(
    page: Any, address: str, tmp_path: Path
) -> None:
    shape = Image.new("RGB", (64, 64))
    shape.paste("white", (8, 24, 36, 56))
    shape.save(tmp_path / "shape.png")
    control = Control(Picture.of(tmp_path / "shape.png"), scale=0.8)
    result = Studio("cpu").draw(Request(APPLE, steps=2, seed=3, controls=(control,)))
    (path,) = save_images(result, tmp_path / "out")
    page.locator("#file").set_input_files(path)
    until(page, "document.getElementById('status').textContent.includes('shape.png')")
    page.locator("#file").set_input_files(tmp_path / "shape.png")
    drawn(page)
    assert pixels(page) == result.images[0].convert("RGBA").tobytes()


@pytest.fixture(scope="module")
def media_address(studio: GatedStudio, media_models: list[str]) -> Iterator[str]:
    """The address of a server with a model of each medium."""
    with listening(studio, models=media_models) as found:
        yield found


def chosen(page: Any, model: str, prompt: str) -> None:
    """Choose a model and say a prompt, and wait until what comes of it is shown."""
    page.select_option("#model", model)
    page.locator("#prompt").fill(prompt)
    shown(page, f"caption.startsWith('{model}') && alt === {json.dumps(prompt)}")


def shown(page: Any, condition: str) -> None:
    """Wait until nothing is under way and something holds of the caption and the alternative."""
    until(
        page,
        "document.getElementById('main').ariaBusy === 'false'"
        " && ((caption, alt) => " + condition + ")("
        "document.getElementById('caption').textContent, document.getElementById('picture').alt)",
    )


def downloaded(page: Any, folder: Path) -> Path:
    """Download what is shown, by the name that the page gives it."""
    with page.expect_download() as saved:
        page.locator("#download").click()
    path = folder / saved.value.suggested_filename
    saved.value.save_as(path)
    return path


_THUMBNAIL = """() => {
    const image = document.querySelector("#history img");
    return [image.naturalWidth, image.naturalHeight];
}"""


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_sound_is_played_shown_saved_and_restored(
    media_address: str, tmp_path: Path, viewport: dict[str, int]
) -> None:
    prompt = "a low piano note, soft"
    with browsing(media_address, viewport=viewport) as page:
        ready(page)
        page.select_option("#model", "sounds")
        assert page.locator("#prompt").get_attribute("placeholder") == prompt
        for hidden in ("#beginning", "#control", "#lengths"):
            assert page.locator(hidden).is_hidden()
        chosen(page, "sounds", prompt)
        assert "1.02 s" in page.locator("#caption").inner_text()
        assert page.locator("#status").inner_text().startswith("Made in")
        # The spectrogram is the picture, and the sound really plays.
        until(page, "document.getElementById('picture').naturalWidth === 256")
        audio = "document.querySelector('#main audio')"
        until(page, f"Math.abs({audio}.duration - 1.024) < 0.01")
        page.evaluate(f"{audio}.play()")
        until(page, f"{audio}.currentTime > 0.2")
        for hidden in ("#go-on", "[data-copy=workflow]", "#main [data-do=halt]", "#main video"):
            assert page.locator(hidden).is_hidden()
        page.wait_for_timeout(800)
        assert page.evaluate(_THUMBNAIL) == [256, 128]

        path = downloaded(page, tmp_path)
        assert path.name == "sounds-2step_1.wav"
        first = read_sound(path)[0].samples
        page.locator("#format").select_option("flac")
        until(page, "document.getElementById('download').download.endsWith('.flac')")
        again = read_sound(downloaded(page, tmp_path))[0].samples
        assert (again - first).abs().max() <= 1 / LEVELS  # the two formats round in their own ways
        assert "format=flac" in written(page, "curl")
        # The next one is asked for in the same format.
        page.locator("#seed").fill("2")
        shown(page, "caption.endsWith('seed 2')")
        assert page.locator("#download").get_attribute("download") == "sounds-2step_2.flac"

        page.get_by_role("button", name="Compare with the teacher").click()
        until(page, "document.querySelector('#beside audio').duration > 1")
        page.screenshot(path=tmp_path / "sound.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert_accessible(page)

        # What is begun next is silent, and the file restores what made it.
        chosen(page, "nano", APPLE)
        assert page.locator("#main audio").is_hidden()
        page.locator("#file").set_input_files(path)
        shown(page, f"caption.endsWith('seed 1') && alt === {json.dumps(prompt)}")
        assert page.locator("#model").input_value() == "sounds"
        assert page.locator("#prompt").input_value() == prompt


@pytest.mark.slow
def test_a_clip_loops_is_halted_saved_and_restored(media_address: str, tmp_path: Path) -> None:
    with browsing(media_address) as page:
        ready(page)
        chosen(page, "clips", APPLE)
        assert "64 × 64, 3 frames, 0.60 s" in page.locator("#caption").inner_text()
        page.locator("#frames").fill("4")
        shown(page, "caption.includes('4 frames')")
        moving = page.locator("#picture").get_attribute("src")
        page.get_by_role("button", name="Pause").click()
        # The first frame alone, which the history shows too.
        page.wait_for_timeout(800)
        still = page.locator("#picture").get_attribute("src")
        assert still != moving
        assert page.locator("#history img").first.get_attribute("src") == still
        page.get_by_role("button", name="Play").click()
        assert page.locator("#picture").get_attribute("src") == moving
        path = downloaded(page, tmp_path)
        assert path.name == "clips-2step_1.webp" and len(read_clip(path)) == 4
        assert "--frames 4" in written(page, "cli")
        assert "frames=4" in written(page, "python")
        assert_accessible(page)

        page.locator("#format").select_option("mp4")
        video = "document.querySelector('#main video')"
        until(page, f"!{video}.hidden && {video}.duration > 0.7")
        assert page.evaluate(f"[{video}.loop, {video}.muted]") == [True, True]
        # It goes round: the time falls again.
        page.evaluate(
            f"window.latest = 0; {video}.ontimeupdate = () => window.latest ="
            f" Math.max(window.latest, {video}.currentTime)"
        )
        until(page, f"window.latest > 0.3 && {video}.currentTime < window.latest")
        page.get_by_role("button", name="Pause").click()
        assert page.evaluate(f"{video}.paused")
        mp4 = downloaded(page, tmp_path)
        assert mp4.name == "clips-2step_1.mp4" and len(read_clip(mp4)) == 4
        page.screenshot(path=tmp_path / "clip.png", full_page=True)

        chosen(page, "nano", APPLE)
        assert page.locator("#main video").is_hidden()
        page.locator("#file").set_input_files(path)
        shown(page, "caption.startsWith('clips') && caption.includes('4 frames')")
        assert page.locator("#frames").input_value() == "4"
        # Into a clip no picture goes.
        Image.new("RGB", (64, 64), "green").save(tmp_path / "plain.png")
        page.locator("#file").set_input_files(tmp_path / "plain.png")
        until(page, "document.getElementById('status').textContent.includes('no picture')")


@pytest.mark.slow
def test_a_clip_stands_still_for_who_asks_for_that(media_address: str) -> None:
    with browsing(media_address, reduced_motion="reduce") as page:
        ready(page)
        chosen(page, "clips", APPLE)
        assert page.get_by_role("button", name="Play").is_visible()
        still = page.locator("#picture").get_attribute("src")
        page.get_by_role("button", name="Play").click()
        assert page.locator("#picture").get_attribute("src") != still


@pytest.mark.slow
def test_escape_stops(page: Any) -> None:
    page.locator("#steps [value='32']").check(force=True)
    # The picture never arrives, so that nothing is over before the key, on however slow a machine.
    page.route("**/images/0", lambda route: None)
    page.locator("#prompt").fill(APPLE)
    until(page, "document.getElementById('progress').value > 0")
    page.locator("#prompt").press("Escape")
    assert page.locator("#status").inner_text() == "Stopped."
    page.wait_for_timeout(1000)
    assert page.locator("#history li").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_state_is_accessible_and_fits(
    address: str, tmp_path: Path, viewport: dict[str, int], scheme: str
) -> None:
    with browsing(address, viewport=viewport, color_scheme=scheme, reduced_motion="reduce") as page:
        ready(page)
        count = 0

        def look(name: str) -> None:
            nonlocal count
            count += 1
            page.screenshot(path=tmp_path / f"{count}_{name}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            assert page.evaluate("document.getAnimations().length") == 0
            assert_accessible(page)

        look("empty")
        page.locator("#prompt").fill(APPLE)
        drawn(page)
        page.wait_for_timeout(800)
        look("drawn")
        page.get_by_role("button", name="Compare with the teacher").click()
        until(page, "!document.getElementById('beside').hidden")
        look("compared")
        page.locator("#steps [value='32']").press("Space")
        until(page, "document.getElementById('caption').textContent.startsWith('nano,')")
        look("teacher")
        page.locator("#steps [value='4']").press("Space")
        page.get_by_role("button", name="Sketch one").click()
        page.locator("#width").fill("30")
        changed_after(page, lambda: stroke(page, (0.3, 0.5), (0.7, 0.5)))
        look("sketch")
        page.get_by_role("button", name="Choose where it changes").click()
        changed_after(page, lambda: stroke(page, (0.2, 0.7), (0.8, 0.7)))
        look("mask")
        page.get_by_role("button", name="Add a ControlNet").click()
        changed_after(page, lambda: stroke(page, (0.5, 0.6), (0.5, 0.8)))
        look("control")
        written(page, "python")
        look("copied")
        page.get_by_role("button", name="Close canvas").click()
        page.evaluate("document.body.classList.add('dropping')")
        look("dropping")
        page.evaluate("document.body.classList.remove('dropping')")
        page.locator("#prompt").fill("apple " * 6000)  # more than may be
        until(page, "document.getElementById('status').textContent.startsWith('Not drawn')")
        look("fault")
        # The browser itself says that it was refused.
        assert len(page.problems) == 1
        page.problems.clear()


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_asks_for_the_key(
    studio: GatedStudio, tmp_path: Path, viewport: dict[str, int]
) -> None:
    rules = Rules("secret")
    with listening(studio, rules=rules) as address, browsing(address, viewport=viewport) as page:
        until(page, "document.getElementById('lock').open")
        page.screenshot(path=tmp_path / "key.png")
        assert_accessible(page)
        page.locator("#key").fill("secret")
        page.locator("#key").press("Enter")
        page.locator("#prompt").fill(APPLE)
        drawn(page)
        assert "$TWOSTEP_KEY" in written(page, "curl")
        # The browser says that the first answer was 401.
        assert len(page.problems) == 1
        page.problems.clear()
