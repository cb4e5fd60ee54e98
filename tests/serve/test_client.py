"""`twostep.Client` against a server on a port, and the addresses for those who run one."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

import twostep
from tests.serve.conftest import APPLE, FakeStudio
from twostep.pipeline.request import Control, Picture, Request, RequestError
from twostep.pipeline.studio import Studio
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.client import ServerError
from twostep.serve.engine import Engine, QueueFullError
from twostep.serve.gate import Rules
from twostep.serve.metrics import Metrics
from twostep.serve.serving import Serving


@pytest.mark.slow
def test_the_client_needs_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys, twostep; twostep.Client; print([n for n in ('torch', 'fastapi', 'starlette')"
    )
    code += " if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_client_draws_follows_and_cancels(address: str, tmp_path: Path) -> None:
    with twostep.Client(address, name="me") as client:
        capabilities = client.capabilities()
        assert capabilities.default_model == "nano"
        assert capabilities.models[0].checkpoints[1].steps == 8
        drawn = client.draw(Request(APPLE, steps=1, seed=3, num_images=2))
        assert (drawn.seeds, drawn.answer.checkpoint) == ([3, 4], "nano-1step")
        assert [image.size for image in drawn.images] == [(64, 64)] * 2
        paths = drawn.save(tmp_path)
        assert [path.name for path in paths] == ["nano-1step_3.png", "nano-1step_4.png"]
        assert drawn.save(tmp_path) == paths
        assert paths[1].read_bytes() == drawn.files[1]

        job = client.submit(Request(APPLE, steps=4), previews=True)
        events = list(job.events())
        assert [event.kind for event in events] == ["queued", *["step"] * 4, "done"]
        assert [event.num_done for event in events] == [0, 1, 2, 3, 4, 0]
        assert events[1].previews[0].size == (64, 64)

        job = client.submit(Request(APPLE, steps=32, num_images=16))
        job.cancel()
        assert client.job(job.id).state() == "cancelled"
        with pytest.raises(ServerError, match="cancelled"):
            job.wait()


@pytest.mark.slow
def test_the_client_sends_pictures_and_masks(address: str) -> None:
    image = Image.new("RGB", (64, 64), "white")
    mask = Image.new("RGBA", (64, 64))
    mask.paste("white", (32, 0, 64, 64))  # white on nothing: the right half is changed
    request = Request(APPLE, steps=2, image=Picture.of(image), mask=Picture.of(mask), strength=1.0)
    with twostep.Client(address) as client:
        (picture,) = client.draw(request).images
    white = [(32 * 64, (255, 255, 255))]
    halves = [picture.crop((0, 0, 32, 64)), picture.crop((32, 0, 64, 64))]
    assert [half.getcolors(4096) == white for half in halves] == [True, False]


def test_the_client_sends_controlnets(address: str) -> None:
    shape = Image.new("RGB", (64, 64))
    shape.paste("white", (8, 24, 36, 56))
    control = Control(Picture.of(shape), scale=0.7, start=0.0, end=0.5)
    request = Request(APPLE, steps=4, seed=7, controls=(control,))
    with twostep.Client(address) as client:
        capabilities = client.capabilities()
        assert (capabilities.controlnets, capabilities.limits.controls) == (["silhouette"], 4)
        (picture,) = client.draw(request).images
        with pytest.raises(ServerError, match="no ControlNet 'depth'; there are silhouette"):
            client.draw(replace(request, controls=(replace(control, model="depth"),)))
    (expected,) = Studio("cpu").draw(request).images
    (without,) = Studio("cpu").draw(replace(request, controls=())).images
    assert picture.convert("RGB").tobytes() == expected.tobytes() != without.tobytes()


def test_the_client_says_what_is_wrong(address: str) -> None:
    with twostep.Client(address) as client:
        with pytest.raises(ServerError, match="not in 50") as caught:
            client.draw(Request(APPLE, steps=50))
        assert caught.value.status == 400
        with pytest.raises(RequestError, match="init_noise"):
            client.draw(Request(APPLE, init_noise="diffusers"))
    with (
        twostep.Client("http://127.0.0.1:9") as nobody,
        pytest.raises(ServerError, match="does not answer"),
    ):
        nobody.capabilities()


def test_metrics_count_what_happens(fake: FakeStudio) -> None:
    metrics = Metrics()
    engine = Engine([fake], max_waiting=2, observers=[metrics])
    metrics.watch(engine)
    application = create_app(Serving(engine, Catalogue(["nano"]), metrics=metrics), Rules())
    with TestClient(application, base_url="http://127.0.0.1") as client:
        engine.submit(Request("first", steps=1))
        assert fake.busy.acquire(timeout=10)
        jobs = [engine.submit(Request(str(i), steps=2)) for i in range(2)]
        with pytest.raises(QueueFullError):
            engine.submit(Request("one more"))
        lines = client.get("/metrics").text.splitlines()
        assert {"twostep_jobs_waiting 2.0", "twostep_jobs_drawing 1.0"} <= set(lines)
        assert "twostep_refused_total 1.0" in lines
        assert client.get("/readyz").json() == {"status": "ok", "waiting": 2, "drawing": 1}
        engine.cancel(jobs[0])
        fake.steps.release(100)
        with pytest.raises(RequestError):
            jobs[1].wait(10.0)
        while engine.num_drawing:
            time.sleep(0.01)
        lines = client.get("/metrics").text.splitlines()
        assert 'twostep_jobs_total{state="failed"} 2.0' in lines
        assert 'twostep_jobs_total{state="cancelled"} 1.0' in lines
        assert "twostep_batch_jobs_count 2.0" in lines
        assert "twostep_wait_seconds_count 2.0" in lines
        assert client.get("/healthz").status_code == 200
    assert client.get("/healthz").status_code == 503
    assert client.get("/readyz").json()["status"] == "unavailable"
