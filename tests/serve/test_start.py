"""A server as it is started: from a file of settings, woken by a signal, and ended by another."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import twostep
from tests.serve.conftest import APPLE
from twostep.serve.client import JobEvent, ServerError

NANO = Path(twostep.__file__).parent / "weights" / "nano"


@pytest.mark.slow
def test_a_server_takes_up_a_model_on_sighup_and_finishes_what_it_accepted_on_sigterm(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "key").write_text("secret\n")
    path = tmp_path / "serve.toml"
    path.write_text(
        f"port = 0\nmodel_folders = ['{folder}']\nmodels = ['nano']\nreload_seconds = 0\n"
        f"log_format = 'json'\nkey_file = '{tmp_path / 'key'}'\n"
    )
    command = [sys.executable, "-m", "twostep", "serve", "--config", str(path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as server,
    ):
        try:
            assert server.stdout is not None
            found = next(
                match for line in server.stdout if (match := re.search(r"http://\S+:\d+", line))
            )
            with pytest.raises(ServerError, match="needs its key"):
                twostep.Client(found[0]).capabilities()
            with twostep.Client(found[0], key="secret") as client:
                source = next((NANO / "students").glob("*_1step_unet.safetensors"))
                shutil.copy(source, folder / "fast.safetensors")
                assert [model.name for model in client.capabilities().models] == ["nano"]
                server.send_signal(signal.SIGHUP)
                end = time.monotonic() + 60
                while len(client.capabilities().models) < 2:
                    assert time.monotonic() < end
                    time.sleep(0.2)
                request = twostep.Request(APPLE, model="fast", seed=3)
                assert client.draw(request).answer.steps == 1
                # A connection that waits for a long drawing is answered although the end is near.
                drawn: list[JobEvent] = []
                long = twostep.Request(APPLE, steps=32, guidance=5.0, num_images=4)
                job = client.submit(long)
                events = job.events()
                kinds = [next(events).kind, next(events).kind]
                assert kinds == ["queued", "step"]
                server.send_signal(signal.SIGTERM)
                rest = threading.Thread(target=lambda: drawn.extend(events))
                rest.start()
                rest.join(120)
                assert drawn[-1].kind == "done"
            assert server.wait(120) in (0, -signal.SIGTERM)
        finally:
            server.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ends = [line for line in lines if line["event"] == "job ended"]
    assert [line["state"] for line in ends] == ["done", "done"]
    assert set(ends[0]["milliseconds"]) >= {"text", "denoise", "decode"}
    assert ends[0]["checkpoint"] == "nano-1step"
    assert any(line["event"] == "taken up again" for line in lines)
    assert any(line["event"] == "request" and line["status"] == 401 for line in lines)
    assert APPLE not in log.read_text()
