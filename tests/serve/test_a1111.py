"""A1111's API, with the bodies that its clients send."""

import base64
import json
import threading
from io import BytesIO
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.serve.conftest import APPLE, FakeStudio
from twostep.serve.a1111_routes import read_settings
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving

PATH = "/sdapi/v1"

SILLY_TAVERN = {
    "url": "http://localhost:7860",
    "auth": "",
    "prompt": APPLE,
    "negative_prompt": "blurry",
    "sampler_name": "DPM++ 2M Karras",
    "scheduler": "Karras",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": 5,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
LIBRE_CHAT = {
    "prompt": APPLE,
    "negative_prompt": "",
    "cfg_scale": 4.5,
    "steps": 22,
    "width": 1024,
    "height": 1024,
}
OPEN_WEBUI = {"prompt": APPLE, "batch_size": 2, "width": 64, "height": 64, "steps": 2}


def in_base64(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


@pytest.mark.parametrize(
    ("body", "steps", "num_changes"),
    [(SILLY_TAVERN, 8, 8), (LIBRE_CHAT, 8, 3), (OPEN_WEBUI, 2, 0)],
    ids=["SillyTavern", "LibreChat", "Open WebUI"],
)
def test_what_clients_send_is_drawn_and_changes_are_told(
    client: TestClient, body: dict[str, Any], steps: int, num_changes: int
) -> None:
    answer = client.post(f"{PATH}/txt2img", json=body, headers={"Authorization": ""})
    assert answer.status_code == 200, answer.text
    values = answer.json()
    info = json.loads(values["info"])
    assert [opened(text).size for text in values["images"]] == [(64, 64)] * len(info["infotexts"])
    assert len(info["infotexts"]) == body.get("batch_size", 1)
    assert (info["steps"], info["cfg_scale"], info["width"]) == (steps, 1, 64)
    assert len(info["twostep"]["changes"]) == num_changes
    assert ("x-twostep-changes" in answer.headers) == (num_changes > 0)
    # png-info reads back what the picture itself says.
    read = client.post(f"{PATH}/png-info", json={"image": values["images"][0]}).json()
    assert read["info"] == info["infotexts"][0]
    assert read["parameters"]["Prompt"] == APPLE
    assert read["parameters"]["Steps"] == str(steps)
    assert (read["parameters"]["Size-1"], "twostep" in read["items"]) == ("64", True)


def test_settings_are_read_with_negative_prompts_and_quotes() -> None:
    text = 'a, b: c\nd\nNegative prompt: e\nSteps: 4, Sampler: Euler, Seed: 1, Note: "x, y: z"'
    assert read_settings(text) == {
        "Prompt": "a, b: c\nd",
        "Negative prompt": "e",
        "Steps": "4",
        "Sampler": "Euler",
        "Seed": "1",
        "Note": "x, y: z",
    }
    assert read_settings("only words") == {"Prompt": "only words", "Negative prompt": ""}


@pytest.mark.parametrize("is_inverted", [0, 1])
def test_masks_free_what_is_white(client: TestClient, is_inverted: int) -> None:
    mask = Image.new("L", (32, 32))  # of another size than the picture, as A1111 allows
    mask.paste(255, (16, 0, 32, 32))
    body = {
        "prompt": APPLE,
        "steps": 2,
        "denoising_strength": 1.0,
        "init_images": ["data:image/png;base64," + in_base64(Image.new("RGB", (64, 64), "white"))],
        "mask": in_base64(mask),
        "mask_blur": 4,
        "inpainting_mask_invert": is_inverted,
    }
    answer = client.post(f"{PATH}/img2img", json=body).json()
    assert (answer["parameters"]["init_images"], answer["parameters"]["mask"]) == (None, None)
    assert "edge is hard" in json.loads(answer["info"])["twostep"]["changes"][0]
    picture = opened(answer["images"][0]).convert("RGB")
    halves = [picture.crop((0, 0, 32, 64)), picture.crop((32, 0, 64, 64))]
    white = [(32 * 64, (255, 255, 255))]
    assert [half.getcolors(4096) == white for half in halves] == [
        not is_inverted,
        bool(is_inverted),
    ]


def test_options_go_round_and_are_those_of_one_client(client: TestClient) -> None:
    before = client.get(f"{PATH}/options").json()
    assert before["sd_model_checkpoint"] == "nano"
    changed = before | {"sd_model_checkpoint": "nano-4step", "samples_format": "webp"}
    me = {"X-Twostep-Client": "me"}
    assert client.post(f"{PATH}/options", json=changed, headers=me).status_code == 200
    assert client.get(f"{PATH}/options", headers=me).json() == changed
    assert client.get(f"{PATH}/options").json() == before
    answer = client.post(f"{PATH}/txt2img", json={"prompt": APPLE}, headers=me).json()
    assert json.loads(answer["info"])["sd_model_name"] == "nano-4step"
    assert opened(answer["images"][0]).format == "WEBP"
    names = [model["title"] for model in client.get(f"{PATH}/sd-models").json()]
    assert names[:2] == ["nano", "nano-8step"]
    for wrong in ({"sd_model_checkpoint": "/etc/passwd"}, {"samples_format": "gif"}):
        answer = client.post(f"{PATH}/options", json=wrong, headers=me)
        assert answer.status_code in (400, 404)
        assert set(answer.json()) == {"error", "detail", "body", "errors", "request_id"}


def test_progress_and_interruption_are_those_of_one_client() -> None:
    fake = FakeStudio(num_steps=4)
    engine = Engine([fake])
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules())
    with TestClient(application, base_url="http://127.0.0.1") as client:
        idle = client.get(f"{PATH}/progress").json()
        assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(client.post(f"{PATH}/txt2img", json=LIBRE_CHAT))
        )
        thread.start()
        assert fake.busy.acquire(timeout=10)
        fake.steps.release(1)
        while (now := client.get(f"{PATH}/progress").json())["progress"] == 0:
            pass
        assert (now["progress"], now["state"]["sampling_steps"]) == (0.25, 4)
        assert now["eta_relative"] > 0
        fake.steps.release(1)
        while (now := client.get(f"{PATH}/progress").json())["progress"] == 0.25:
            pass
        assert opened(now["current_image"]).size == (8, 8)
        other = {"X-Twostep-Client": "other"}
        assert client.get(f"{PATH}/progress", headers=other).json()["state"]["job_count"] == 0
        client.post(f"{PATH}/interrupt", headers=other)
        assert not answers
        client.post(f"{PATH}/interrupt")
        thread.join(10)
        assert (answers[0].status_code, "cancelled" in answers[0].json()["detail"]) == (409, True)
        fake.steps.release(100)
        idle = client.get(f"{PATH}/progress").json()
        assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    assert fake.num_calls == 3  # the one under way, and none after


def test_a_strict_server_refuses_instead(fake: FakeStudio, engine: Engine) -> None:
    application = create_app(Serving(engine, Catalogue(["nano"]), strict=True), Rules())
    client = TestClient(application, base_url="http://127.0.0.1")
    for body in ({"steps": 20}, {"steps": 4, "cfg_scale": 7}, {"enable_hr": True}):
        answer = client.post(f"{PATH}/txt2img", json={"prompt": APPLE} | body)
        assert (answer.status_code, "strict" in answer.json()["detail"]) == (400, True)
    assert not fake.drawn


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("txt2img", b"{"),
        ("txt2img", b"[1]"),
        ("txt2img", b'{"prompt": "x", "unknown": 1e400}'),
        ("txt2img", b'{"prompt": "x", "unknown": NaN}'),
        ("txt2img", b'{"prompt": "x", "unknown": ' + b"[" * 101 + b"]" * 101 + b"}"),
        ("txt2img", b'{"prompt": "x", "steps": "many"}'),
        ("txt2img", b'{"prompt": "x", "batch_size": 17}'),
        ("txt2img", b'{"prompt": "x <lora:/etc/passwd:1>"}'),
        ("img2img", b'{"prompt": "x"}'),
        ("img2img", b'{"prompt": "x", "init_images": ["http://127.0.0.1/a.png"]}'),
        ("img2img", b'{"prompt": "x", "init_images": ["AAAA"]}'),
        ("png-info", b'{"image": "AAAA"}'),
    ],
)
def test_bad_requests_get_the_shape_of_error(client: TestClient, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post(f"{PATH}/{path}", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors", "request_id"}
