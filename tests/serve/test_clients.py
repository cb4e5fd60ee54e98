"""The clients that people use, against a server on a port."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from PIL import Image, ImageChops

from tests.serve.conftest import APPLE, FakeStudio, GatedStudio, listening
from twostep.media.audio import read_sound
from twostep.pipeline.request import Control, Picture, Request
from twostep.pipeline.studio import Studio
from twostep.serve.logs import JobLog

# These take seconds to import, which those need not wait for who leave slow tests out.
if TYPE_CHECKING:
    from openai import OpenAI
    from webuiapi import WebUIApi

pytestmark = pytest.mark.slow


@pytest.fixture
def openai(address: str) -> OpenAI:
    from openai import OpenAI

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
    from openai import BadRequestError

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


def test_openai_streams_three_pictures_and_edits(openai: OpenAI) -> None:
    three = openai.images.generate(
        prompt=APPLE, n=3, stream=True, partial_images=1, extra_body={"steps": 4, "seed": 7}
    )
    kinds = [event.type.rpartition(".")[2] for event in three]
    assert kinds == ["partial_image"] * 3 + ["completed"] * 3
    image = ("a.png", png(Image.new("RGB", (64, 64), "white")), "image/png")
    edits = list(
        openai.images.edit(
            image=image, prompt=APPLE, n=3, stream=True, partial_images=0, extra_body={"steps": 1}
        )
    )
    assert [event.type for event in edits] == ["image_edit.completed"] * 3
    assert edits[0].usage.input_tokens_details.image_tokens == 1


def test_openai_is_told_of_changed_steps_and_guidance(openai: OpenAI) -> None:
    wish = {"num_inference_steps": 50, "guidance_scale": 7, "seed": 1}
    answer = openai.images.generate(prompt=APPLE, quality="xhigh", size="auto", extra_body=wish)
    assert answer.model_extra is not None
    drawn = answer.model_extra["twostep"]
    assert (drawn["steps"], drawn["guidance"]) == (8, 1.0)
    assert ["50" in change or "guidance 7" in change for change in drawn["changes"]] == [True] * 2


def test_openai_is_told_when_the_queue_is_full() -> None:
    from openai import OpenAI, RateLimitError

    fake = FakeStudio()
    with listening(fake, max_waiting=1) as address:
        for prompt in ("drawn", "waits"):
            answer = httpx2.post(f"{address}/api/v1/jobs", json={"prompt": prompt})
            assert answer.status_code == 202
            if prompt == "drawn":
                assert fake.busy.acquire(timeout=10)
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        with pytest.raises(RateLimitError) as caught:
            client.images.generate(prompt="one more")
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "rate_limit_error"
        assert caught.value.code == "queue_full"
        fake.steps.release(10)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_client_that_hangs_up_frees_the_device(address: str, path: str) -> None:
    # Two minutes of drawing on a laptop, of which one step is waited for.
    body = {"prompt": APPLE, "steps": 32, "n": 10, "batch_size": 10, "guidance_scale": 5}
    name = {"X-Twostep-Client": path}

    def state() -> tuple[int, int]:
        now = httpx2.get(f"{address}/readyz", timeout=60).json()
        return now["waiting"], now["drawing"]

    with socket.create_connection(address.removeprefix("http://").split(":")) as connection:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        while state() != (0, 1):
            time.sleep(0.01)
    start = time.monotonic()
    while state() != (0, 0):
        time.sleep(0.01)
    freed = time.monotonic() - start
    start = time.monotonic()
    answer = httpx2.post(f"{address}{path}", json=body | {"steps": 1}, headers=name, timeout=60)
    assert answer.status_code == 200
    assert freed < 10 * (time.monotonic() - start)  # of 64 calls it was one or two


def test_openai_lists_models(openai: OpenAI) -> None:
    names = [model.id for model in openai.models.list()]
    assert names[0] == "nano"
    assert openai.models.retrieve("nano-2step").id == "nano-2step"


@pytest.fixture
def webui(address: str) -> WebUIApi:
    from webuiapi import WebUIApi

    return WebUIApi(baseurl=f"{address}/sdapi/v1")


def test_webuiapi_draws(webui: WebUIApi) -> None:
    result = webui.txt2img(prompt=APPLE, seed=7, batch_size=2, cfg_scale=7)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert (result.info["steps"], result.info["all_seeds"]) == (8, [7, 8])
    changes = " ".join(result.info["twostep"]["changes"])
    for word in ("Euler a", "20", "guidance 7", "512x512"):
        assert word in changes
    info = webui.png_info(result.image)
    assert info.info == result.info["infotexts"][0]
    assert info.parameters["Seed"] == "7"


def test_webuiapi_is_told_what_is_not_here(webui: WebUIApi) -> None:
    with pytest.raises(RuntimeError, match="404"):
        webui.interrogate(Image.new("RGB", (64, 64)))
    with pytest.raises(RuntimeError, match="404"):
        webui.extra_single_image(Image.new("RGB", (64, 64)))
    with pytest.raises(RuntimeError, match="prompt"):
        webui.txt2img(prompt=" ")


def test_webuiapi_changes_pictures(webui: WebUIApi) -> None:
    image = Image.new("RGB", (64, 64), "white")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    result = webui.img2img(images=[image], mask_image=mask, prompt=APPLE, denoising_strength=1.0)
    changed = result.image.convert("RGB")
    assert changed.crop((0, 0, 32, 64)).getcolors() == [(2048, (255, 255, 255))]
    assert changed.crop((32, 0, 64, 64)).getcolors() != [(2048, (255, 255, 255))]


def test_webuiapi_uses_controlnets(webui: WebUIApi) -> None:
    from webuiapi import ControlNetUnit

    assert webui.controlnet_version() == 3
    assert webui.controlnet_model_list() == ["silhouette"]
    assert webui.controlnet_module_list() == ["none", "invert"]
    shape = Image.new("RGB", (64, 64))
    shape.paste("white", (8, 24, 36, 56))
    unit = ControlNetUnit(image=shape, model="silhouette", weight=0.8, guidance_end=0.5)
    result = webui.txt2img(prompt=APPLE, steps=4, seed=7, controlnet_units=[unit])
    control = Control(Picture.of(shape), scale=0.8, end=0.5)
    (expected,) = Studio("cpu").draw(Request(APPLE, steps=4, seed=7, controls=(control,))).images
    assert result.image.convert("RGB").tobytes() == expected.tobytes()
    (turned,) = webui.controlnet_detect([shape], module="invert").images
    assert turned.getpixel((0, 0)) == (255, 255, 255)
    # Of a picture that is changed, the unit looks at that where it has none of its own.
    unit = ControlNetUnit(model="silhouette")
    result = webui.img2img(images=[shape], prompt=APPLE, steps=4, controlnet_units=[unit])
    assert result.image.size == (64, 64)


def test_webuiapi_tours_the_rest(webui: WebUIApi) -> None:
    assert "Euler" in webui.util_get_sampler_names()
    assert webui.util_get_scheduler_names() == ["automatic", "simple"]
    webui.util_set_model("nano-4step")
    assert webui.util_get_current_model() == "nano-4step"
    assert webui.txt2img(prompt=APPLE, steps=4).info["sd_model_name"] == "nano-4step"
    webui.set_options(webui.get_options() | {"sd_model_checkpoint": "nano"})
    assert webui.util_get_current_model() == "nano"
    webui.util_wait_for_ready()
    assert webui.get_memory()["ram"]["total"] > 2**28
    assert webui.interrupt() == {}
    assert webui.skip() == {}
    assert webui.refresh_checkpoints() == {}
    assert webui.get_loras() == []
    assert not webui.has_controlnet
    for empty in (
        webui.get_sd_vae,
        webui.get_upscalers,
        webui.get_latent_upscale_modes,
        webui.get_hypernetworks,
        webui.get_face_restorers,
        webui.get_realesrgan_models,
        webui.get_prompt_styles,
        webui.get_cmd_flags,
    ):
        assert len(empty()) == 0
    assert webui.get_embeddings()["loaded"] == {}


def test_an_mcp_client_calls_the_tools(
    studio: GatedStudio, caplog: pytest.LogCaptureFixture
) -> None:
    from mcp.client.client import Client as McpClient

    async def tour(address: str) -> None:
        steps: list[float] = []

        async def note(done: float, total: float | None, _: str | None) -> None:
            steps.append(done)

        async with McpClient(f"{address}/mcp") as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert set(tools) == {"generate_image", "describe_models"}
            assert tools["generate_image"].input_schema["required"] == ["prompt"]
            wish = {"prompt": APPLE, "steps": 20, "seed": 7, "num_images": 2}
            drawn = await client.call_tool("generate_image", wish, progress_callback=note)
            *pictures, text = drawn.content
            assert [picture(each.data).size for each in pictures] == [(64, 64)] * 2
            told = json.loads(text.text)
            assert (told["steps"], told["seeds"], len(told["changes"])) == (8, [7, 8], 1)
            shape = Image.new("RGB", (64, 64), "white")
            control = {"name": "silhouette", "picture": base64.b64encode(png(shape)).decode()}
            wish = {"prompt": APPLE, "steps": 4, "controls": [control]}
            drawn = await client.call_tool("generate_image", wish)
            assert picture(drawn.content[0].data).size == (64, 64)
            wish["controls"] = [control | {"name": "depth"}]
            wrong = await client.call_tool("generate_image", wish)
            assert "there are silhouette" in wrong.content[0].text
            told = json.loads((await client.call_tool("describe_models", {})).content[0].text)
            assert told["controlnets"] == ["silhouette"]
            wrong = await client.call_tool("generate_image", {"prompt": " "})
            assert wrong.is_error
            assert "prompt is empty" in wrong.content[0].text
        assert steps[-1] == 8

    caplog.set_level(logging.INFO, "twostep.serve")
    with listening(studio, with_mcp=True, log=JobLog()) as found:
        asyncio.run(tour(found))
    asked = {vars(each).get("request_id") for each in caplog.records if each.msg == "job ended"}
    assert len(asked) == 2
    assert all(asked)


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


def test_the_python_of_the_page_runs(
    studio: GatedStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parents[2]
    sounds = root / "distributions/media/twostep_media/nano-audio"
    with listening(studio, models=["nano", str(sounds)]) as address:
        _try_the_page((root / "docs/serve.md").read_text(), address)
    assert len(list(tmp_path.glob("out/*.png"))) == 1
    assert read_sound(tmp_path / "note.wav")[0].seconds == 1.024


def _try_the_page(page: str, address: str) -> None:
    """Run the page's Python at an address."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    answers = []
    for block in blocks:
        scope: dict[str, Any] = {}
        port = address.rpartition(":")[2]
        exec(block.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("8000", port), scope)
        answers.append(scope["answer"])
    openai_answer, _, webui_answer, own_answer, controlled = answers
    assert openai_answer.data[0].seed == 7
    assert webui_answer.info["seed"] == 7
    assert own_answer.seeds == controlled.seeds == [7]
