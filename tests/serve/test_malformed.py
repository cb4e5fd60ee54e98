"""Bodies and pictures that no client should send: each is answered, and none brings a fault."""

import base64
import json
import random
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx2
import psutil
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import twostep
from tests.serve.conftest import APPLE, FakeStudio
from tests.serve.malformed import attack, damaged, hang_up
from tests.serve.processes import running
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving

pytestmark = pytest.mark.slow


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    return buffer.getvalue()


IDLE = ("waiting", "drawing")
"""What is zero where a server has nothing to do."""

TEXT = base64.b64encode(png()).decode()
BODIES: dict[str, dict[str, Any]] = {
    "/v1/images/generations": {
        "prompt": "x",
        "model": "nano",
        "n": 2,
        "size": "64x64",
        "quality": "high",
        "output_format": "webp",
        "output_compression": 50,
        "steps": 4,
        "seed": 3,
        "guidance_scale": 2.0,
        "stream": False,
        "partial_images": 2,
        "loras": [],
    },
    "/sdapi/v1/txt2img": {
        "prompt": "x <b>",
        "negative_prompt": "y",
        "seed": -1,
        "steps": 20,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "batch_size": 1,
        "n_iter": 1,
        "sampler_name": "Euler a",
        "scheduler": "Karras",
        "override_settings": {"sd_model_checkpoint": "nano"},
        "alwayson_scripts": {"ControlNet": {"args": []}},
        "styles": [],
    },
    "/sdapi/v1/img2img": {
        "prompt": "x",
        "init_images": [TEXT],
        "mask": TEXT,
        "denoising_strength": 0.5,
        "inpainting_mask_invert": 1,
        "width": 64,
        "height": 96,
    },
    "/sdapi/v1/options": {"sd_model_checkpoint": "nano", "samples_format": "png"},
    "/sdapi/v1/png-info": {"image": TEXT},
    "/api/v1/jobs": {
        "prompt": "x",
        "steps": 2,
        "seed": 5,
        "width": 64,
        "height": 64,
        "image": TEXT,
        "strength": 0.5,
        "mask": TEXT,
        "sampler": "euler",
        "loras": ["a:1"],
        "seconds": 5,
    },
}
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1e999,
    float("nan"),
    2**70,
    -0.5,
    "",
    " ",
    "\ud800",
    "\x00",
    "x" * 40_000,
    "data:image/png;base64,",
    "http://127.0.0.1/a.png",
    "<lora:a:1:2>",
    "((((",
    "[a:b:0.5]",
    [],
    [None],
    [[]],
    {},
    {"args": None},
    {"": {}},
)


@pytest.fixture
def client() -> Iterator[TestClient]:
    fake = FakeStudio()
    fake.steps.release(10**6)
    serving = Serving(Engine([fake]), Catalogue(["nano"]))
    application = create_app(serving, Rules())
    with TestClient(
        application, base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as client:
        yield client


def test_bodies_with_odd_values_bring_no_fault(client: TestClient) -> None:
    dice = random.Random(0)
    headers = {"Content-Type": "application/json"}
    for i in range(2000):
        path = dice.choice(list(BODIES))
        body = dict(BODIES[path])
        for _ in range(dice.randint(1, 2)):
            body[dice.choice(list(body))] = dice.choice(ODD)
        content = json.dumps(body).encode()
        if dice.random() < 0.1:
            content = damaged(content, dice)
        answer = client.post(path, content=content, headers=headers)
        assert answer.status_code < 500, (i, path, body, answer.text)


def test_damaged_pictures_bring_no_fault(client: TestClient) -> None:
    dice = random.Random(1)
    for i in range(200):
        data = damaged(png(dice.choice([(64, 64), (1, 1), (7, 3000), (2000, 2000)])), dice)
        text = base64.b64encode(data).decode()
        for path, body in (
            ("/sdapi/v1/img2img", {"prompt": "x", "init_images": [text]}),
            ("/sdapi/v1/png-info", {"image": text}),
            ("/api/v1/jobs", {"prompt": "x", "image": text, "mask": text}),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code < 500, (i, path, answer.text)
        files = {"image": ("a.png", data), "mask": ("m.png", png())}
        answer = client.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        assert answer.status_code < 500, (i, answer.text)


def test_a_bomb_is_refused_before_it_is_unpacked(client: TestClient) -> None:
    buffer = BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    answer = client.post("/sdapi/v1/img2img", json={"prompt": "x", "init_images": [text]})
    assert answer.status_code == 400, answer.text
    assert client.post("/sdapi/v1/png-info", json={"image": text}).status_code < 500


def test_two_thousand_malformed_requests_and_a_thousand_hung_up_leave_nothing_behind() -> None:
    request = twostep.Request(APPLE, seed=7, steps=1)
    with running(kept_jobs=10) as server, twostep.Client(server.address) as client:
        process = psutil.Process(server.pid)
        expected = client.draw(request).files
        # What any server takes once: caches, threads, and what large pictures leave.
        # Jobs that it keeps would grow until there are a thousand: here they are ten.
        attack(server.address, 1_400, seed=0)
        before = process.memory_info().rss
        answered = attack(server.address, 2_000, seed=1)
        hang_up(server.address, 1_000, seed=2)
        assert client.draw(request).files == expected
        assert server.is_alive
        while any(httpx2.get(f"{server.address}/readyz", timeout=60).json()[it] for it in IDLE):
            time.sleep(0.1)
        now = process.memory_info().rss
        assert now < 1.05 * before, (now / 2**20, before / 2**20)
        assert len(process.net_connections(kind="tcp")) < 20
    assert answered.total() == 2_000
    assert answered["400"] > 1_000
    assert answered["closed"] < 100, answered
