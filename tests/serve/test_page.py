"""The live page in a real browser: it draws while one types, and everything is reached by keys."""

import shutil
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from fastapi.testclient import TestClient
from PIL import Image

from tests.serve.conftest import APPLE
from twostep.serve.page_routes import PAGE_FILES

_PIXELS = """
    const image = document.getElementById("picture");
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    [...context.getImageData(0, 0, canvas.width, canvas.height).data];
"""
"""Reads the picture that is shown, as RGBA."""


def test_the_page_is_served_and_fetches_from_nowhere_else(client: TestClient) -> None:
    for address, (_, kind) in PAGE_FILES.items():
        answer = client.get(address)
        assert answer.headers["content-type"].startswith(kind)
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
        for elsewhere in ("http://", "https://", "cdn"):
            assert elsewhere not in answer.text


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": 1440, "height": 900},
            permissions=["clipboard-read", "clipboard-write"],
        )
        page = context.new_page()
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


def until(page: Any, condition: str) -> None:
    """Wait until something is so; the page's policy forbids what Playwright has for that."""
    end = time.monotonic() + 60
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def drawn(page: Any) -> None:
    """Wait until what is wished is shown."""
    until(
        page,
        "document.getElementById('picture').alt === document.getElementById('prompt').value"
        " && document.getElementById('status').textContent.startsWith('Drawn')",
    )


def assert_accessible(page: Any) -> None:
    """Let axe look at the page as it stands."""
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


@pytest.mark.slow
def test_typing_draws_and_the_newest_wins(page: Any, tmp_path: Path) -> None:
    page.locator("#prompt").press_sequentially(APPLE, delay=30)
    drawn(page)
    assert page.locator("#picture").get_attribute("alt") == APPLE
    assert page.locator("#caption").inner_text().startswith("nano-2step, 64 × 64")
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 64
    # Wasted runs are those that came to an end for a prompt that was typed over.
    assert page.locator("#history li").count() <= 1 + len(APPLE) // 2
    page.screenshot(path=tmp_path / "wide.png")

    # A student has no guidance, and the page says why; the teacher has.
    assert page.locator("#guidance").is_disabled()
    assert "student" in page.locator("#why").inner_text()
    page.get_by_role("radio", name="2", exact=False).first.focus()
    page.get_by_role("radio", name="32").press("Space")
    drawn(page)
    until(page, "document.getElementById('caption').textContent.startsWith('nano,')")
    assert page.locator("#guidance").is_enabled()
    assert page.locator("#compare").is_hidden()

    # Back at a student, the teacher draws from the same noise.
    page.get_by_role("radio", name="1", exact=False).first.focus()
    page.locator("#steps [value='1']").press("Space")
    until(page, "document.getElementById('caption').textContent.startsWith('nano-1step')")
    page.get_by_role("button", name="Compare with the teacher").click()
    until(page, "!document.getElementById('beside').hidden")
    assert "32 steps" in page.locator("#reference-caption").inner_text()
    page.screenshot(path=tmp_path / "compared.png")
    assert_accessible(page)

    page.get_by_role("button", name="Python").click()
    text = page.evaluate("navigator.clipboard.readText()")
    assert f'twostep.Request("{APPLE}", model="nano", steps=1, seed=1)' in text


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
    data = page.evaluate(_PIXELS)
    assert bytes(data) == Image.open(BytesIO(made)).convert("RGBA").tobytes()

    Image.new("RGB", (64, 64), "green").save(tmp_path / "plain.png")
    page.locator("#file").set_input_files(tmp_path / "plain.png")
    until(page, "document.getElementById('history').children.length > 1")
    assert page.locator("#begun").is_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    assert_accessible(page)


@pytest.mark.slow
def test_escape_stops(page: Any) -> None:
    page.locator("#steps [value='32']").check(force=True)
    page.locator("#prompt").fill(APPLE)
    until(page, "document.getElementById('progress').value > 0")
    page.locator("#prompt").press("Escape")
    assert page.locator("#status").inner_text() == "Stopped."
    page.wait_for_timeout(300)
    assert page.locator("#history li").count() == 0
