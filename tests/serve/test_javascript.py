"""OpenAI's client for JavaScript, as npm has it, against a server on a port."""

import base64
import json
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.conftest import APPLE, GatedStudio
from twostep.pipeline.request import Request

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("openai_client.mjs")


@pytest.fixture(scope="module")
def found(address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script got."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("javascript")
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), "openai@6"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install openai: {installed.stderr[-200:]}")
    script = Path(shutil.copy(SCRIPT, folder))
    Image.new("RGB", (64, 64), "white").save(folder / "a.png")
    hole = Image.new("RGBA", (64, 64), "black")
    hole.paste((0, 0, 0, 0), (32, 0, 64, 64))
    hole.save(folder / "m.png")
    command = ["node", str(script), address, str(folder / "a.png"), str(folder / "m.png")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    answers: dict[str, Any] = json.loads(ran.stdout)
    return answers


def test_it_draws_what_is_drawn_here(found: dict[str, Any], studio: GatedStudio) -> None:
    drawn = found["generate"]
    assert (drawn["seeds"], drawn["arePngs"]) == ([7, 8, 9], True)
    assert (drawn["outputTokens"], drawn["checkpoint"]) == (3, "nano-1step")
    picture = Image.open(BytesIO(base64.b64decode(drawn["first"])))
    here = studio.draw(Request(APPLE, seed=7, steps=1, num_images=3)).images[0]
    assert picture.tobytes() == here.tobytes()


def test_what_was_meant_for_others_is_changed_and_told(found: dict[str, Any]) -> None:
    assert found["aliased"]["size"] == "64x64"
    for word in ("gpt-image-2.6", "1024x1024"):
        assert word in found["aliased"]["changes"]


def test_streams_bring_partial_images_and_usage(found: dict[str, Any]) -> None:
    assert all(is_png for *_, is_png in found["stream"])
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [event[:2] for event in found["stream"]] == [
        *[[partial, 0]] * 3,
        *[[partial, 1]] * 3,
        *[[completed, None]] * 3,
    ]
    assert found["usage"]["output_tokens"] == 12
    assert found["editStream"] == ["image_edit.partial_image", "image_edit.completed"]


def test_pictures_are_edited_alone_and_as_a_list(found: dict[str, Any]) -> None:
    assert found["edits"] == [[True, True], [True, True]]


def test_models_are_listed_and_errors_have_their_class(found: dict[str, Any]) -> None:
    assert found["models"][:2] == ["nano", "nano-8step"]
    assert found["errors"] == [["BadRequestError", 400, "invalid_request_error", "string"]] * 3
