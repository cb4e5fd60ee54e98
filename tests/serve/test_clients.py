"""The clients that people use, against a server on a port."""

import base64
import os
import re
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image, ImageChops

pytestmark = pytest.mark.slow

APPLE = "a 3d red apple on a blue background"


@pytest.fixture
def openai(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def picture(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(BytesIO(base64.b64decode(text)))


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_openai_generates(openai: OpenAI) -> None:
    answer = openai.images.generate(
        prompt=APPLE, size="auto", n=3, extra_body={"steps": 4, "seed": 7}
    )
    assert [picture(item.b64_json).size for item in answer.data or []] == [(64, 64)] * 3
    assert answer.usage is not None
    assert answer.usage.output_tokens == 12
    assert answer.model_extra is not None
    assert answer.model_extra["twostep"]["checkpoint"] == "nano-4step"
    again = openai.images.generate(
        model="nano-4step", prompt=APPLE, response_format="b64_json", extra_body={"seed": 8}
    )
    assert answer.data and again.data
    pair = [picture(item.b64_json) for item in (again.data[0], answer.data[1])]
    # Alone and among three a picture may differ in its last bit.
    assert max(ImageChops.difference(*pair).tobytes()) <= 2


def test_openai_takes_what_was_meant_for_others(openai: OpenAI) -> None:
    raw = openai.images.with_raw_response.generate(
        model="gpt-image-2.6", prompt=APPLE, quality="high", size="1024x1024"
    )
    assert "gpt-image-2.6" in raw.headers["x-twostep-changes"]
    assert raw.parse().size == "64x64"
    with pytest.raises(BadRequestError, match="prompt"):
        openai.images.generate(prompt=" ")


@pytest.mark.parametrize("as_list", [False, True])
def test_openai_edits(openai: OpenAI, as_list: bool) -> None:
    image = ("a.png", png(Image.new("RGB", (64, 64), "white")), "image/png")
    hole = Image.new("RGBA", (64, 64), "black")
    hole.paste((0, 0, 0, 0), (32, 0, 64, 64))
    mask = ("m.png", png(hole), "image/png")
    answer = openai.images.edit(image=[image] if as_list else image, mask=mask, prompt=APPLE)
    assert answer.data is not None
    changed = picture(answer.data[0].b64_json).convert("RGB")
    assert changed.crop((0, 0, 32, 64)).getcolors() == [(2048, (255, 255, 255))]
    assert changed.crop((32, 0, 64, 64)).getcolors() != [(2048, (255, 255, 255))]


def test_openai_streams(openai: OpenAI) -> None:
    stream = openai.images.generate(
        prompt=APPLE, stream=True, partial_images=2, extra_body={"steps": 8}
    )
    events = list(stream)
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + [
        "completed"
    ]
    assert events[-1].type == "image_generation.completed"
    assert events[-1].usage.output_tokens == 8
    assert all(picture(event.b64_json).size for event in events)


def test_openai_lists_models(openai: OpenAI) -> None:
    names = [model.id for model in openai.models.list()]
    assert names[0] == "nano"
    assert openai.models.retrieve("nano-2step").id == "nano-2step"


def test_a_server_that_is_terminated_finishes_what_it_accepted() -> None:
    command = [sys.executable, "-m", "twostep", "serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    ) as server:
        assert server.stdout is not None
        found = re.search(r"http://\S+:\d+", server.stdout.readline())
        assert found is not None
        body = {"prompt": APPLE, "steps": 32, "n": 4, "stream": True, "partial_images": 3}
        path = f"{found[0]}/v1/images/generations"
        with httpx2.stream("POST", path, json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)  # a first step is there, so it is drawn
            server.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert text.count("event: image_generation.completed") == 4
        # uvicorn ends by the signal that it got, when all is done.
        assert server.wait(60) == -signal.SIGTERM


def test_the_python_of_the_page_runs(address: str) -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert blocks
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block.replace("http://127.0.0.1:8000", address), scope)
        assert scope["answer"].data[0].seed == 7
