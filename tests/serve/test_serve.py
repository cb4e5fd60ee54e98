"""The engine's order and ends, and both APIs as their clients use them."""

import asyncio
import base64
import json
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from tests.serve.conftest import APPLE, FakeStudio, GatedStudio, posting
from twostep.cli import app as cli
from twostep.contract import ContractError
from twostep.pipeline.request import MAX_BATCH, Picture, Request, RequestError
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue, Wish
from twostep.serve.engine import (
    CancelledError,
    ClosingError,
    Engine,
    EngineError,
    Event,
    LateError,
    QueueFullError,
)
from twostep.serve.following import in_header
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving


def first_job(engine: Engine, fake: FakeStudio) -> None:
    """Keep the thread busy, so that what follows waits."""
    engine.submit(Request("first", steps=1))
    assert fake.busy.acquire(timeout=10)


def test_clients_take_turns_and_what_is_alike_is_drawn_together(
    engine: Engine, fake: FakeStudio
) -> None:
    first_job(engine, fake)
    greedy = [engine.submit(Request(f"a{i}", steps=i), client="a") for i in (2, 4, 8)]
    alike = engine.submit(Request("b", steps=4), client="b")
    large = engine.submit(Request("c", steps=4, num_images=MAX_BATCH), client="c")
    fake.steps.release(100)
    for job in (*greedy, alike, large):
        with pytest.raises(RequestError, match="drawn"):
            job.wait(10.0)
    # b's turn comes second and takes a4 along; c has a batch of its own before a8's turn.
    assert fake.drawn == [["first"], ["a2"], ["b", "a4"], ["c"], ["a8"]]


def test_room_that_is_left_in_a_batch_goes_to_all_clients(
    engine: Engine, fake: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostep.serve.engine.MAX_BATCH", 5)
    first_job(engine, fake)
    for client, count in (("a", 3), ("b", 3), ("c", 2)):
        for i in range(count):
            engine.submit(Request(f"{client}{i}"), client=client)
    fake.steps.release(100)
    engine.close(10.0)
    # The two places that are left are b's and c's, not both b's.
    assert fake.drawn == [["first"], ["a0", "b0", "c0", "b1", "c1"], ["b2", "a1", "a2"]]


def test_a_full_queue_says_when_to_come_again(engine: Engine, fake: FakeStudio) -> None:
    first_job(engine, fake)
    for i in range(8):
        engine.submit(Request(str(i)))
    with pytest.raises(QueueFullError) as caught:
        engine.submit(Request("one more"))
    assert caught.value.retry_after >= 1
    assert engine.num_waiting == 8


def test_cancelling_frees_the_device_before_the_next_call() -> None:
    fake = FakeStudio(num_steps=50)
    engine = Engine([fake])
    job = engine.submit(Request("long"))
    assert fake.busy.acquire(timeout=10)
    assert engine.cancel(job)
    assert not engine.cancel(job)
    fake.steps.release(1)  # the call under way
    other = engine.submit(Request("next"))
    assert fake.busy.acquire(timeout=10)
    assert fake.num_calls == 1
    with pytest.raises(CancelledError):
        job.wait(0.0)
    fake.steps.release(50)
    engine.close(10.0)
    assert other.state == "failed"


def test_late_jobs_fail_while_they_wait(engine: Engine, fake: FakeStudio) -> None:
    first_job(engine, fake)
    job = engine.submit(Request("late"), seconds=1e-6)
    fake.steps.release(1)
    with pytest.raises(LateError):
        job.wait(10.0)
    assert ["late"] not in fake.drawn


def test_a_fault_ends_the_job_that_has_it_alone(engine: Engine, fake: FakeStudio) -> None:
    first_job(engine, fake)
    good, bad = engine.submit(Request("good")), engine.submit(Request("broken"))
    fake.steps.release(100)
    with pytest.raises(RequestError, match="drawn good"):
        good.wait(10.0)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        bad.wait(10.0)
    assert engine.is_alive


def test_pictures_that_went_in_are_forgotten_with_their_jobs(
    engine: Engine, fake: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostep.serve.engine.MAX_KEPT_PIXELS", 3 * 64 * 64)
    fake.steps.release(100)
    picture = Picture.of(Image.new("RGB", (64, 64)))
    jobs = [engine.submit(Request(str(i), image=picture, seed=i)) for i in range(5)]
    jobs.append(engine.submit(Request("with a mask", image=picture, mask=picture)))
    for job in jobs:
        with pytest.raises(RequestError, match="drawn"):
            job.wait(10.0)
    assert [engine.find(job.id) is None for job in jobs] == [True, True, True, True, False, False]


@pytest.mark.parametrize("has_time", [True, False])
def test_every_accepted_job_ends_at_shutdown(has_time: bool) -> None:
    fake = FakeStudio()
    engine = Engine([fake])
    events: list[Event] = []
    jobs = [engine.submit(Request(str(i), steps=i + 1)) for i in range(3)]
    for job in jobs:
        job.follow(events.append)
    assert fake.busy.acquire(timeout=10)
    if has_time:
        fake.steps.release(100)
    else:
        threading.Timer(0.2, fake.steps.release, [100]).start()
    engine.close(10.0 if has_time else 0.0)
    expected = RequestError if has_time else ClosingError
    assert [type(job.error) for job in jobs] == [expected] * 3
    assert sum(event.is_end for event in events) == 3
    with pytest.raises(ClosingError):
        engine.submit(Request("too late"))


def test_wishes_become_what_the_model_can_do_or_are_refused() -> None:
    catalogue = Catalogue(["nano"])
    wish = Wish("x", model="gpt-image-1", steps=50, guidance=7.0, width=1024, height=768)
    fitted = catalogue.fit(wish, strict=False)
    assert (fitted.request.steps, fitted.request.guidance) == (8, None)
    assert (fitted.request.width, fitted.request.height) == (64, 64)
    assert len(fitted.changes) == 4
    assert catalogue.fit(Wish("x", model="nano-4step"), strict=True).request.steps == 4
    assert catalogue.fit(Wish("x", steps=32, guidance=7.0), strict=True).request.guidance == 7.0
    with pytest.raises(ContractError, match="8, 4, 2, 1 steps, not in 50"):
        catalogue.fit(Wish("x", steps=50), strict=True)
    for tag in ("<lora:/etc/passwd:1>", "<lora:../secret>"):
        with pytest.raises(RequestError, match="no LoRA"):
            catalogue.fit(Wish(f"x {tag}"), strict=False)


def test_what_clients_wrote_is_printable_in_headers() -> None:
    sentences = ["no model 'a\x11\x00\x7fb'", "é\n\t c \ud800 😀"]
    assert in_header(sentences) == r"no model 'a\x11\x00\x7fb'; \xe9 c \ud800 \U0001f600"


def drawn(answer: Any) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(item["b64_json"]) for item in answer.json()["data"]]


@pytest.mark.slow
def test_files_equal_those_of_the_command_line_whatever_shares_the_batch(
    client: TestClient, studio: GatedStudio, tmp_path: Path
) -> None:
    words = ["generate", APPLE, "--steps", "1", "--seed", "7", "-o", str(tmp_path)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    (expected,) = [path.read_bytes() for path in tmp_path.glob("*.png")]
    body = {"prompt": APPLE, "num_inference_steps": 1, "seed": 7, "size": "auto"}
    assert drawn(client.post("/v1/images/generations", json=body)) == [expected]
    # Now with another in the batch: the thread is held at the gate while they come.
    while studio.arrived.acquire(blocking=False):
        pass
    studio.gate.clear()
    client.post("/api/v1/jobs", json={"prompt": "a dog", "steps": 1})
    assert studio.arrived.acquire(timeout=10)
    jobs = [
        client.post("/api/v1/jobs", json={"prompt": prompt, "steps": 1, "seed": 7}).json()
        for prompt in ("a cat", APPLE)
    ]
    studio.gate.set()
    for job in jobs:
        assert "event: done" in client.get(job["events"]).text
    assert studio.sizes[-2:] == [1, 2]
    (path,) = client.get(f"/api/v1/jobs/{jobs[1]['id']}").json()["images"]
    assert client.get(path).content == expected


def test_what_openai_clients_send_is_drawn_and_changes_are_told(client: TestClient) -> None:
    body = {
        "prompt": APPLE,
        "model": "gpt-image-2.6",
        "size": "1024x1024",
        "quality": "xhigh",
        "background": "auto",
        "style": "vivid",
        "guidance_scale": 7,
        "output_format": "jpeg",
    }
    headers = {"Authorization": ""}
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    picture = Image.open(BytesIO(drawn(answer)[0]))
    assert (picture.format, picture.size) == ("JPEG", (64, 64))
    told = answer.json()["twostep"]
    assert (told["checkpoint"], len(told["changes"])) == ("nano-8step", 3)
    assert "gpt-image-2.6" in answer.headers["x-twostep-changes"]
    assert answer.json()["usage"]["output_tokens"] == 8
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names[:2] == ["nano", "nano-8step"]


def test_streams_send_partial_images_and_usage(client: TestClient) -> None:
    body = {"prompt": APPLE, "steps": 4, "seed": 3, "stream": True, "partial_images": 2}
    text = client.post("/v1/images/generations", json=body).text
    blocks = text.strip().split("\n\n")
    assert blocks.pop() == "data: [DONE]"
    events = [json.loads(block.partition("data: ")[2]) for block in blocks]
    kinds = [event["type"].removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event.get("partial_image_index") for event in events] == [0, 1, None]
    assert events[-1]["usage"]["input_tokens_details"]["image_tokens"] == 0
    last = drawn(client.post("/v1/images/generations", json=body | {"stream": False}))
    assert base64.b64decode(events[-1]["b64_json"]) == last[0]


def png(mode: str = "RGB", hole: int | None = None) -> bytes:
    image = Image.new(mode, (64, 64), "white")
    if hole is not None:
        image.paste((255, 255, 255, 0), (hole, 0, 64, 64))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("field", ["image", "image[]"])
def test_edits_keep_what_the_mask_does_not_free(client: TestClient, field: str) -> None:
    form = {"prompt": "a red apple", "steps": "2", "seed": "1", "n": "1"}
    files = {field: ("a.png", png()), "mask": ("m.png", png("RGBA", hole=32))}
    (data,) = drawn(client.post("/v1/images/edits", data=form, files=files))
    picture = Image.open(BytesIO(data)).convert("RGB")
    assert picture.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (255, 255, 255))]
    colours = picture.crop((32, 0, 64, 64)).getcolors(4096)
    assert colours is not None
    assert len(colours) > 50


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/images/generations", b"{", 400),
        ("/v1/images/generations", b"[]", 400),
        ("/v1/images/generations", b'{"prompt": " "}', 400),
        ("/v1/images/generations", b'{"prompt": "x", "n": 11}', 400),
        ("/v1/images/generations", b'{"prompt": "x", "size": "large"}', 400),
        ("/v1/images/generations", b'{"prompt": "\\ud800"}', 400),
        ("/api/v1/jobs", b'{"prompt": "x", "steps": 50}', 400),
        ("/api/v1/jobs", b'{"prompt": "x", "model": "/etc/passwd"}', 404),
        ("/api/v1/jobs", b'{"prompt": "x", "image": "%%%"}', 400),
        ("/api/v1/jobs", b'{"prompt": "x", "colour": 1}', 422),
        ("/nowhere", b"", 404),
    ],
)
def test_bad_requests_get_one_shape_of_error(
    client: TestClient, path: str, body: bytes, status: int
) -> None:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_native_api_says_what_it_can_and_how_it_stands(client: TestClient) -> None:
    (model,) = client.get("/api/v1/capabilities").json()["models"]
    assert [each["steps"] for each in model["checkpoints"]] == [32, 8, 4, 2, 1]
    job = client.post("/api/v1/jobs", json={"prompt": APPLE, "steps": 2, "previews": True}).json()
    events = client.get(job["events"]).text
    assert [line[7:] for line in events.splitlines() if line.startswith("event: ")] == [
        "queued",
        "step",
        "step",
        "done",
    ]
    long = client.post("/api/v1/jobs", json={"prompt": "x", "steps": 32, "num_images": 16}).json()
    assert client.delete(f"/api/v1/jobs/{long['id']}").json()["state"] == "cancelled"
    assert client.get("/api/v1/jobs/nothing").status_code == 404


def test_a_client_that_leaves_cancels_its_job(fake: FakeStudio, engine: Engine) -> None:
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules())
    body = json.dumps({"prompt": "long"}).encode()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.to_thread(fake.busy.acquire)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = posting("/v1/images/generations")
    asyncio.run(application(scope, receive, send))
    (job,) = engine._ended.values()
    assert job.state == "cancelled"


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        (Rules(), {}, 200),
        (Rules(), {"Host": "evil.example"}, 403),
        (Rules(), {"Origin": "http://evil.example"}, 403),
        (Rules(), {"Content-Length": str(2**40)}, 413),
        (Rules(key="secret"), {}, 401),
        (Rules(key="secret"), {"Authorization": "Bearer wrong"}, 401),
        (Rules(key="secret"), {"Authorization": "Bearer secret", "Host": "box"}, 200),
        (Rules(key="secret"), {"Authorization": "Basic dTpzZWNyZXQ="}, 200),
    ],
)
def test_the_gate_lets_in_what_it_should(
    engine: Engine, rules: Rules, headers: dict[str, str], status: int
) -> None:
    application = create_app(Serving(engine, Catalogue(["nano"])), rules)
    client = TestClient(application, base_url="http://127.0.0.1")
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_others_than_this_machine_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TWOSTEP_KEY", raising=False)
    answer = CliRunner().invoke(cli, ["serve", "--host", "0.0.0.0"])
    assert answer.exit_code == 1
    assert "--key-file" in answer.output
