"""What Open WebUI, SillyTavern and LibreChat send, in their order, as their sources have it."""

import base64
import json
from io import BytesIO
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.serve.conftest import APPLE

SIZE = (64, 64)
A1111 = "/sdapi/v1"


def png(colour: str = "white") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", SIZE, colour).save(buffer, "PNG")
    return buffer.getvalue()


def opened(item: dict[str, Any]) -> Image.Image:
    """Open a picture of OpenAI's API as these programs do: they look for an address first."""
    assert item.get("url") is None
    return Image.open(BytesIO(base64.b64decode(item["b64_json"])))


def test_open_webui_draws_and_edits_by_openai(client: TestClient) -> None:
    # n, size and response_format as it always sends them; what its admin adds is merged in.
    headers = {"Authorization": "Bearer ", "Content-Type": "application/json"}
    body = {
        "model": "gpt-image-1",
        "prompt": APPLE,
        "n": 1,
        "size": "512x512",
        "response_format": "b64_json",
        "steps": 1,
    }
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert [opened(item).size for item in answer.json()["data"]] == [SIZE]
    # Edits are a form of text, with several pictures and an address's query as their names.
    form = {"model": "gpt-image-1", "prompt": APPLE, "n": "1", "size": "512x512", "steps": "1"}
    form["response_format"] = "b64_json"
    for pictures in (
        [("image", ("a.png", png(), "image/png"))],
        [("image[]", (f"{i}.png", png(), "image/png")) for i in range(2)],
    ):
        edited = client.post("/v1/images/edits", data=form, files=pictures)
        assert edited.status_code == 200, edited.text
        assert [opened(item).size for item in edited.json()["data"]] == [SIZE]
        changes = edited.json()["twostep"]["changes"]
        assert any("the first alone" in change for change in changes) == (len(pictures) > 1)


def test_open_webui_chooses_a_model_by_a1111(client: TestClient) -> None:
    mine = {"X-Twostep-Client": "Open WebUI", "Authorization": ""}
    options = client.get(f"{A1111}/options", headers=mine).json()
    assert options["sd_model_checkpoint"] == "nano"  # its button "verify" asks for this
    titles = [each["title"] for each in client.get(f"{A1111}/sd-models", headers=mine).json()]
    assert "nano-2step" in titles
    options["sd_model_checkpoint"] = "nano-2step"
    assert client.post(f"{A1111}/options", json=options, headers=mine).status_code == 200
    # Fifty steps are its default, and the negative prompt of a chat comes along.
    body = {
        "prompt": APPLE,
        "batch_size": 1,
        "width": 512,
        "height": 512,
        "steps": 50,
        "negative_prompt": "blurry",
        "cfg_scale": 7,
        "sampler_name": "Euler a",
        "scheduler": "Karras",
    }
    answer = client.post(f"{A1111}/txt2img", json=body, headers=mine).json()
    assert isinstance(answer["info"], str)
    info = json.loads(answer["info"])
    assert (info["steps"], info["cfg_scale"], info["sd_model_name"]) == (2, 1, "nano-2step")
    told = " ".join(info["twostep"]["changes"])
    for word in ("not in 50", "guidance 7", "negative prompt", "512x512", "Euler a", "Karras"):
        assert word in told


def test_silly_tavern_goes_its_round(client: TestClient) -> None:
    mine = {"X-Twostep-Client": "SillyTavern"}
    assert client.get(f"{A1111}/options", headers=mine).status_code == 200
    names = {
        path: [each[key] for each in client.get(f"{A1111}/{path}", headers=mine).json()]
        for path, key in (
            ("samplers", "name"),
            ("schedulers", "name"),
            ("sd-models", "title"),
            ("sd-vae", "model_name"),
            ("upscalers", "name"),
            ("latent-upscale-modes", "name"),
        )
    }
    assert "Euler" in names["samplers"]
    choice = {"sd_model_checkpoint": names["sd-models"][-1]}
    assert client.post(f"{A1111}/options", json=choice, headers=mine).status_code == 200
    # Then it waits until nothing is under way, by this very condition.
    now = client.get(f"{A1111}/progress", headers=mine).json()
    assert now["progress"] == 0.0
    assert now["state"]["job_count"] == 0
    assert client.post(f"{A1111}/interrupt", headers=mine).status_code == 200


def test_libre_chat_draws_and_edits_by_openai(client: TestClient) -> None:
    # No response_format is sent, and b64_json is read.
    body = {
        "model": "gpt-image-1",
        "prompt": APPLE,
        "n": 1,
        "background": "auto",
        "quality": "auto",
        "size": "auto",
        "output_format": "webp",
        "output_compression": 80,
    }
    answer = client.post("/v1/images/generations", json=body).json()
    assert opened(answer["data"][0]).format == "WEBP"
    form = {"model": "gpt-image-1", "prompt": APPLE, "n": "1", "quality": "auto", "size": "auto"}
    files = [("image[]", ("a.png", png("red"), "image/png"))]
    edited = client.post("/v1/images/edits", data=form, files=files)
    assert edited.status_code == 200, edited.text
    assert opened(edited.json()["data"][0]).size == SIZE


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]", "images"])
def test_a_picture_may_come_under_any_of_its_names(client: TestClient, name: str) -> None:
    files = [(name, ("a.png", png(), "image/png"))]
    answer = client.post("/v1/images/edits", data={"prompt": "x", "steps": "1"}, files=files)
    assert answer.status_code == 200, answer.text


def test_no_page_of_another_origin_is_let_in(client: TestClient) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = client.options("/v1/images/generations", headers=asked)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control-")]
