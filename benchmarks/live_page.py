"""How soon the live page shows what was typed, and how much is drawn for nothing.

A server in a process of its own draws with nano, and 40 characters are typed on its page in
Chromium, at several speeds. Printed is JSON: milliseconds of one run as the page feels it (Enter to
picture), from the last key to the picture of the whole text, and how many runs were begun, shown,
and begun but never shown.

    python benchmarks/live_page.py --steps 2 --delays 30 80 150 --repeats 5
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from typing import Any

from playwright.sync_api import Page, sync_playwright

TEXT = "a 3d red apple on a blue background, big"

_WATCH = """
    window.keyAt = 0;
    window.shownAt = 0;
    const status = document.getElementById("status");
    const prompt = document.getElementById("prompt");
    const note = () => Object.assign(window, { keyAt: performance.now(), shownAt: 0 });
    prompt.addEventListener("keydown", note, true);
    new MutationObserver(() => {
      const isWhole = document.getElementById("picture").alt === prompt.value;
      if (status.textContent.startsWith("Drawn") && isWhole) window.shownAt = performance.now();
    }).observe(status, { childList: true, characterData: true, subtree: true });
"""
"""Notes when the last key went down, and when the picture of the whole text was shown."""


def main() -> None:
    """Start a server, type, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2, help="steps of the student")
    parser.add_argument("--delays", type=int, nargs="+", default=[30, 80, 150], help="ms a key")
    parser.add_argument("--repeats", type=int, default=5, help="how often the text is typed")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "twostep", "serve", "nano", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+:\d+", server.stdout.readline())
            assert found is not None, "the server did not say where it is"
            figures = measure(found[0], arguments.steps, arguments.delays, arguments.repeats)
        finally:
            server.terminate()
    print(json.dumps(figures, indent=2))


def measure(address: str, steps: int, delays: list[int], repeats: int) -> dict[str, Any]:
    """Return the figures of a server at an address."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(address)
        page.locator(f"#steps [value='{steps}']").check(force=True)
        page.evaluate(_WATCH)
        page.locator("#prompt").fill(TEXT)
        page.locator("#prompt").press("Enter")
        run = [_lone_run(page) for _ in range(2 * repeats + 1)][1:]
        typed = {delay: [_type(page, delay) for _ in range(repeats)] for delay in delays}
        browser.close()
    one = statistics.median(run)
    return {
        "steps": steps,
        "characters": len(TEXT),
        "one_run_ms": {"median": round(one), "all": [round(each) for each in run]},
        "allowed_ms": round(150 + one),
        "typed": {
            f"{delay} ms a key": {
                "last_key_to_picture_ms": [round(each["latency"]) for each in rounds],
                "median_ms": round(statistics.median(each["latency"] for each in rounds)),
                "begun": [each["begun"] for each in rounds],
                "shown": [each["shown"] for each in rounds],
                "wasted": [each["begun"] - each["shown"] for each in rounds],
            }
            for delay, rounds in typed.items()
        },
    }


def _lone_run(page: Page) -> float:
    """Draw the same again, and return the milliseconds from the key to the picture."""
    page.locator("#prompt").press("Enter")
    return _wait(page)


def _type(page: Page, delay: int) -> dict[str, Any]:
    """Type the text anew; returns how it went."""
    page.locator("#prompt").fill("")
    page.wait_for_timeout(1000)
    counts = {"begun": 0, "shown": 0}

    def count(request: Any) -> None:
        if request.method == "POST":
            counts["begun"] += 1
        if "/images/0" in request.url:
            counts["shown"] += 1

    page.on("request", count)
    page.locator("#prompt").press_sequentially(TEXT, delay=delay)
    latency = _wait(page)
    page.remove_listener("request", count)
    return {"latency": latency, **counts}


def _wait(page: Page) -> float:
    """Wait for the picture of the whole text, and return the milliseconds since the last key."""
    for _ in range(3000):
        if page.evaluate("window.shownAt > window.keyAt"):
            return float(page.evaluate("window.shownAt - window.keyAt"))
        page.wait_for_timeout(10)
    raise TimeoutError("no picture was shown within 30 s")


if __name__ == "__main__":
    main()
