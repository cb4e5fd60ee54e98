"""The log and request ids: one line each, and no prompt unless it was asked for."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.serve.conftest import FakeStudio, posting
from twostep.pipeline.request import Request
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.logs import JobLog, set_up_logs
from twostep.serve.serving import Serving

SECRET = "an apple of my neighbour's secret garden"


class Logged:
    """What was written to stderr."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured
        self._text = ""

    def getvalue(self) -> str:
        self._text += self._captured.readouterr().err
        return self._text


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Logged]:
    """The log; the loggers are as before at the end."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.getLogger("twostep").level)
    yield Logged(capsys)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logging.getLogger("twostep").setLevel(before[2])
    logging.captureWarnings(False)


def lines(stream: Logged) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def drawn(fake: FakeStudio, *, with_prompts: bool, prompt: str = SECRET) -> Any:
    """Draw a job over HTTP, and return the answer."""
    log = JobLog(with_prompts=with_prompts)
    set_up_logs("json", "info", log, with_prompts=with_prompts)
    engine = Engine([fake], observers=[log])
    serving = Serving(engine, Catalogue(["nano"]), log=log)
    application = create_app(serving, Rules(), log_prompts=with_prompts)
    fake.steps.release(100)
    client = TestClient(application, base_url="http://127.0.0.1")
    headers = {"X-Request-ID": "mine-1", "X-Twostep-Client": "me"}
    body = {"prompt": prompt, "steps": 2}
    answer = client.post("/v1/images/generations", json=body, headers=headers)
    engine.close(10.0)
    return answer


def test_a_job_is_three_lines_with_one_request_id(fake: FakeStudio, logged: Logged) -> None:
    answer = drawn(fake, with_prompts=False)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["request_id"] == "mine-1"
    assert {each["event"] for each in lines(logged)} == {"jobs started", "job ended", "request"}
    by_event = {each["event"]: each for each in lines(logged)}
    started, ended, request = (by_event[name] for name in ("jobs started", "job ended", "request"))
    assert started["jobs"] == [ended["job"]]
    assert (ended["state"], ended["batch"], ended["client"]) == ("failed", 1, "me")
    assert (ended["error"], ended["request_id"]) == ("RequestError", "mine-1")
    assert ended["milliseconds_waited"] >= 0
    assert (request["status"], request["path"]) == (400, "/v1/images/generations")
    assert (request["request_id"], request["level"]) == ("mine-1", "info")
    # The studio's error quotes the prompt, which the answer may and the log must not.
    assert SECRET in answer.text
    assert SECRET not in logged.getvalue()


def test_prompts_are_logged_where_that_was_asked_for(fake: FakeStudio, logged: Logged) -> None:
    drawn(fake, with_prompts=True)
    by_event = {each["event"]: each for each in lines(logged)}
    assert by_event["jobs started"]["prompts"] == [SECRET]
    assert by_event["job ended"]["reason"] == f"drawn {SECRET}"


@pytest.mark.parametrize("with_prompts", [False, True])
def test_faults_are_logged_without_the_prompts_they_quote(
    fake: FakeStudio,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
    with_prompts: bool,
) -> None:
    def fail(requests: list[Request], on_step: Any = None, **others: Any) -> Any:
        raise ZeroDivisionError(f"cannot draw {requests[0].prompt}: out of ink")

    monkeypatch.setattr(fake, "submit", fail)
    answer = drawn(fake, with_prompts=with_prompts)
    assert (answer.status_code, SECRET in answer.text) == (500, False)
    (failed,) = (each for each in lines(logged) if "exception" in each)
    assert "out of ink" in failed["exception"]
    assert "ZeroDivisionError" in failed["exception"]
    assert (SECRET in logged.getvalue()) == with_prompts


def test_a_fault_of_a_route_is_answered_with_the_id_and_logged_without_words(
    fake: FakeStudio, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Catalogue, wish: Any, *, strict: bool) -> None:
        raise ZeroDivisionError(wish.prompt)

    monkeypatch.setattr(Catalogue, "fit", fail)
    answer = drawn(fake, with_prompts=False)
    assert answer.status_code == 500
    assert (answer.headers["x-request-id"], answer.json()["request_id"]) == ("mine-1", "mine-1")
    assert answer.json()["error"]["type"] == "server_error"
    (failed,) = (each for each in lines(logged) if each["event"] == "request failed")
    assert failed["error"] == "ZeroDivisionError"
    assert "in fail" in failed["traceback"]
    assert SECRET not in logged.getvalue()


def test_a_client_that_leaves_while_it_asks_is_no_fault(engine: Engine, logged: Logged) -> None:
    set_up_logs("json", "info", JobLog())
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules())
    coming: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"prompt": ', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return coming.pop(0)

    async def send(_: Any) -> None:
        raise AssertionError("nobody is there")

    asyncio.run(application(posting("/v1/images/generations"), receive, send))
    (line,) = lines(logged)
    assert (line["event"], line["level"], line["status"]) == ("request", "info", 499)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [("a-1.B_2", True), ("", False), ("x" * 129, False), ("a b", False), ('"}{', False)],
)
def test_ids_of_clients_are_taken_where_they_are_sane(
    client: TestClient, given: str, is_taken: bool
) -> None:
    answer = client.get("/sdapi/v1/nowhere", headers={"X-Request-ID": given})
    found = answer.headers["x-request-id"]
    assert (found == given) == is_taken
    assert re.fullmatch(r"[0-9a-f]{32}", found) or is_taken
    assert answer.json()["request_id"] == found
    assert client.get("/healthz").headers["x-request-id"] != found


def test_what_machines_ask_all_the_time_is_quiet(
    fake: FakeStudio, logged: Logged, engine: Engine
) -> None:
    set_up_logs("json", "info", JobLog())
    application = create_app(Serving(engine, Catalogue(["nano"])), Rules())
    client = TestClient(application, base_url="http://127.0.0.1")
    for path in ("/healthz", "/readyz", "/v1/models"):
        client.get(path)
    assert [each["path"] for each in lines(logged)] == ["/v1/models"]


def test_a_path_forges_no_line_of_the_text(client: TestClient, logged: Logged) -> None:
    set_up_logs("text", "info", JobLog())
    client.get("/x%0A2026 [info] all is well")
    logging.getLogger("other").info("quiet")
    (line,) = logged.getvalue().splitlines()
    assert "status=404" in line
