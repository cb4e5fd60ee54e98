"""The server as an attacker finds it: keys, origins, names that are paths, endless headers."""

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.serve.conftest import posting
from twostep.pipeline.request import RequestError
from twostep.serve import gate
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue, UnknownModelError, Wish
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.serving import Serving

BASIC = {"Authorization": "Basic dTpzZWNyZXQ="}  # u:secret
BEARER = {"Authorization": "Bearer secret"}
PAGE = "https://draw.example"
NAMED = frozenset({PAGE})


def client_under(engine: Engine, rules: Rules) -> TestClient:
    application = create_app(Serving(engine, Catalogue(["nano"])), rules)
    return TestClient(application, base_url="http://127.0.0.1")


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        # A page on this machine that was rebound, one of others, and one that is named.
        (Rules(), {"Host": "127.0.0.1.evil.example"}, 403),
        (Rules(), {"Host": "[::1]"}, 200),
        (Rules(), {"Host": ""}, 403),
        (Rules(), {"Origin": "null"}, 403),
        (Rules(), {"Origin": PAGE}, 403),
        (Rules(origins=NAMED), {"Origin": PAGE}, 200),
        (Rules(origins=NAMED), {"Origin": PAGE + ".evil.example"}, 403),
        (Rules(origins=NAMED), {"Origin": "http://draw.example"}, 403),
        (Rules(origins=NAMED), {"Origin": PAGE, "Host": "evil.example"}, 403),
        # With a key a browser sends a password along unasked, but never a bearer's key.
        (Rules("secret"), BASIC | {"Origin": PAGE}, 403),
        (Rules("secret", origins=NAMED), BASIC | {"Origin": PAGE}, 200),
        (Rules("secret"), BASIC | {"Origin": "http://127.0.0.1"}, 200),
        (Rules("secret"), BEARER | {"Origin": PAGE}, 200),
        (Rules("secret", origins=NAMED), {"Origin": PAGE}, 401),
        (Rules("secret"), {"Authorization": "Bearer"}, 401),
        (Rules("secret"), {"Authorization": "Bearer secret2"}, 401),
        (Rules("secret"), {"Authorization": "Basic %%%"}, 401),
        (Rules("secret"), {"Authorization": "Basic c2VjcmV0"}, 401),  # no colon
    ],
)
def test_who_may_come_in(
    engine: Engine, rules: Rules, headers: dict[str, str], status: int
) -> None:
    answer = client_under(engine, rules).get("/v1/models", headers=headers)
    assert answer.status_code == status, answer.text
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (PAGE if rules.origins and headers.get("Origin") == PAGE else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_browsers_may_ask_before_they_ask_where_their_page_is_named(engine: Engine) -> None:
    client = client_under(engine, Rules("secret", origins=NAMED))
    for origin, status in ((PAGE, 200), ("https://evil.example", 400)):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        answer = client.options("/v1/images/generations", headers=headers)
        assert answer.status_code == status
        assert ("access-control-allow-origin" in answer.headers) == (status == 200)
    assert client_under(engine, Rules()).options("/v1/models").status_code == 405


def test_keys_are_compared_in_constant_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return False

    monkeypatch.setattr(gate.secrets, "compare_digest", compare)
    client = client_under(engine, Rules("secret"))
    for given in ("secret", "s", ""):
        headers = {"Authorization": f"Bearer {given}"}
        assert client.get("/v1/models", headers=headers).status_code == 401
    assert compared == [(b"secret", b"secret"), (b"s", b"secret"), (b"", b"secret")]


PLACES = (
    "/etc/passwd",
    "../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x.safetensors",
    "hf:owner/name",
    "owner/name",
    "nano/../nano",
    "./nano",
    "nano\x00",
    "C:\\windows",
)


@pytest.mark.parametrize("place", PLACES)
def test_models_loras_and_controlnets_are_names_and_no_places(place: str) -> None:
    catalogue = Catalogue(["nano"], controlnets=["silhouette"])
    with pytest.raises(UnknownModelError):
        catalogue.find(place)
    assert catalogue.fit(Wish("x", model=place), strict=False).request.model == "nano"
    with pytest.raises(RequestError, match="there is no LoRA"):
        catalogue.fit(Wish("x", loras=(place,)), strict=False)
    with pytest.raises(RequestError, match="there is no ControlNet"):
        catalogue.find_controlnet(place)


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://127.0.0.1:1/a.png", "/etc/passwd"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/v1/jobs", "image"),
        ("/sdapi/v1/img2img", "init_images"),
        ("/sdapi/v1/png-info", "image"),
    ],
)
def test_places_in_requests_are_neither_fetched_nor_opened(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, field: str, place: str
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", connect)
    value = [place] if field == "init_images" else place
    answer = client.post(path, json={"prompt": "x", field: value})
    assert answer.status_code == 400
    assert "base64" in answer.text


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page.css/../../config.py", "/config.py"],
)
def test_the_page_has_its_own_files_alone(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_rest_of_a_request_is_not_awaited_for_ever(engine: Engine) -> None:
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules(body_seconds=0.05))
    messages = [{"type": "http.request", "body": b'{"prom', "more_body": True}]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = posting("/v1/images/generations")
    start = time.monotonic()
    asyncio.run(application(scope, receive, send))
    assert time.monotonic() - start < 10
    assert sent[0]["status"] == 408
    assert "did not come" in json.loads(sent[1]["body"])["error"]["message"]


def test_a_key_file_that_is_empty_or_missing_starts_no_server(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from twostep.cli import app as cli

    empty = tmp_path / "key"
    empty.write_text(" \n")
    for path in (empty, tmp_path / "none"):
        answer = CliRunner().invoke(cli, ["serve", "--host", "0.0.0.0", "--key-file", str(path)])
        assert answer.exit_code == 1
        assert path.name in answer.output


@pytest.mark.slow
def test_headers_that_do_not_end_are_refused_by_a_real_server(address: str) -> None:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: ")
        sent = 0
        answer = b""
        with contextlib.suppress(ConnectionError):
            while sent < 2**24:
                connection.sendall(b"x" * 2**16)
                sent += 2**16
        with contextlib.suppress(ConnectionError):
            answer = connection.recv(2**16)
    # The server hung up or said so; it did not collect 16 MiB.
    assert sent < 2**24
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
