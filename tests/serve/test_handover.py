"""Commands hand drawings to a server of the same user, and get the files that they would write."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app
from twostep.pipeline.order import Order, OrderError
from twostep.serve.announcement import (
    SWITCH,
    Announcement,
    announced,
    announcements,
    folder_of_announcements,
    this_program,
)
from twostep.serve.catalogue import Catalogue
from twostep.serve.config import ServeSettings
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.handover import HandedOverError, hand_over
from twostep.serve.handover_routes import _Body, _why_not
from twostep.serve.serving import Serving
from twostep.serve.start import _announcement

from .conftest import GatedStudio, listening

TOKEN = "a token"
KEY = "a key"


@pytest.fixture(scope="module")
def keyed(studio: GatedStudio) -> Iterator[str]:
    """The address of a server that asks for a key, and takes drawings that are handed over."""
    with listening(studio, handover_token=TOKEN, rules=Rules(KEY)) as address:
        yield address


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login of its own, in which servers are asked."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(SWITCH, "")
    return tmp_path


def announcement(address: str) -> Announcement:
    return Announcement(address, key=KEY, token=TOKEN, program=this_program())


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_are_the_same_byte_for_byte(
    keyed: str, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = runtime / "apple.png"
    mask = runtime / "mask.png"
    Image.new("RGB", (80, 64), "red").save(picture)
    Image.new("L", (80, 64), 255).save(mask)
    edit = ["edit", "a blue apple", str(picture), "--mask", str(mask), "--steps", "4"]
    commands = [
        ["generate", "a red apple", "-n", "2", "--seed", "7"],
        [*edit, "--control", f"{picture}@silhouette:0.5"],
    ]
    for command in commands:
        monkeypatch.setenv(SWITCH, "off")
        alone = CliRunner().invoke(app, [*command, "--out", str(runtime / "alone")])
        assert alone.exit_code == 0, alone.output
        monkeypatch.setenv(SWITCH, "")
        with announced(announcement(keyed)):
            handed = CliRunner().invoke(app, [*command, "--out", str(runtime / "handed")])
        assert handed.exit_code == 0, handed.output
        assert f"drawn by {keyed}" in handed.stderr and "drawn by" not in alone.stderr
    assert files_in(runtime / "alone") == files_in(runtime / "handed")
    assert len(files_in(runtime / "handed")) == 3


def test_a_command_that_hands_over_loads_no_torch(keyed: str, runtime: Path) -> None:
    code = """
import sys
from typer.testing import CliRunner
from twostep.cli import app
answer = CliRunner().invoke(app, ["generate", "a red apple", "--out", sys.argv[1]])
assert "drawn by" in answer.stderr, answer.output
print([name for name in ("torch", "numpy", "diffusers", "httpx2") if name in sys.modules])
"""
    with announced(announcement(keyed)):
        process = subprocess.run(
            [sys.executable, "-c", code, str(runtime)], capture_output=True, text=True, check=False
        )
    assert process.stdout.strip() == "[]", process.stderr


def test_what_cannot_be_drawn_is_said_as_here(keyed: str, runtime: Path) -> None:
    with (
        announced(announcement(keyed)),
        pytest.raises(HandedOverError, match="nothing for 7 steps"),
    ):
        hand_over(Order("an apple", "nano", steps=7), print)


def test_what_is_not_served_is_drawn_here(keyed: str, runtime: Path) -> None:
    lines: list[str] = []
    with announced(announcement(keyed)):
        assert hand_over(Order("an apple", "mini"), lines.append) is None
    assert lines == [f"{keyed} does not draw it (mini is not among its models): drawn here."]


def test_names_that_mean_something_else_there_are_not_drawn(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(engine, Catalogue(["nano"]))

    def problem(order: Order, model_path: str | None = None, folder: str | None = None) -> str:
        body = _Body(order=order.to_json(), model_path=model_path, folder=folder, pictures={})
        return _why_not(serving, order, body) or ""

    nano = Order("an apple", "nano")
    assert problem(nano) == ""
    # The command's own folder has something of that name.
    assert problem(nano, model_path=str(tmp_path / "nano")) == "nano is another model there"
    assert "other files there" in problem(nano, folder=str(tmp_path))
    assert problem(nano, folder=str(Path.cwd())) == ""
    # The server's has.
    (tmp_path / "nano").mkdir()
    (tmp_path / "style.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert problem(nano) == "nano is another model there"
    assert problem(nano, model_path=str(tmp_path / "nano")) == ""
    styled = replace(nano, loras=("style:0.5",))
    assert "other files there" in problem(styled, model_path=str(tmp_path / "nano"))


def test_a_file_of_the_folder_is_not_looked_for_elsewhere(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runtime / "style.safetensors").touch()
    (runtime / "edges").mkdir()
    monkeypatch.chdir(runtime)
    assert Order("a", "nano", loras=("style:0.8",)).depends_on_folder
    assert Order("a", "nano", controls=("p.png@edges:0.8",)).depends_on_folder
    assert Order("a <lora:style:1>", "nano").depends_on_folder
    absolute = str(runtime / "style.safetensors")
    assert not Order("a", "nano", loras=(absolute, "nano_2step_lora:0.5")).depends_on_folder
    assert not Order("a", "nano", controls=("p.png@silhouette",)).depends_on_folder


def test_who_does_not_know_the_token_is_refused(keyed: str, runtime: Path) -> None:
    lines: list[str] = []
    for wrong in (replace(announcement(keyed), token="x"), replace(announcement(keyed), key=None)):
        with announced(wrong):
            assert hand_over(Order("an apple", "nano"), lines.append) is None
    assert len(lines) == 2 and "user" in lines[0] and "key" in lines[1]


def test_dead_servers_are_passed_over_and_forgotten(runtime: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    lines: list[str] = []
    with announced(announcement(f"http://127.0.0.1:{port}")):
        assert len(announcements()) == 1
        assert hand_over(Order("an apple", "nano"), lines.append) is None
        assert announcements() == [] and lines == []


def test_only_the_same_program_of_the_same_user_is_asked(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = announcement("http://127.0.0.1:1")
    folder = folder_of_announcements()
    with announced(mine):
        (path,) = folder.iterdir()
        assert path.stat().st_mode & 0o077 == 0 or folder.stat().st_mode & 0o077 == 0
        assert [each for _, each in announcements()] == [mine]
        monkeypatch.setenv("OMP_NUM_THREADS", "97")
        assert announcements() == []
        monkeypatch.undo()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        monkeypatch.setenv(SWITCH, "")
        path.write_text(json.dumps({"address": "http://127.0.0.1:1"}))
        assert announcements() == []
        folder.chmod(0o777)
        assert announcements() == []
        folder.chmod(0o700)
    assert list(folder.iterdir()) == []


def test_servers_that_draw_otherwise_or_elsewhere_are_not_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(SWITCH, "")
    told = _announcement(ServeSettings(), 8000, key=None, token=TOKEN)
    assert told == Announcement("http://127.0.0.1:8000", None, TOKEN, this_program())
    others = [
        {"devices": ("cpu",)},
        {"host": "192.0.2.1"},
        {"filter": {"function": "mine:judge"}},
    ]
    for values in others:
        settings = ServeSettings.model_validate(values)
        assert _announcement(settings, 8000, key=KEY, token=TOKEN) is None
    monkeypatch.setenv(SWITCH, "off")
    assert _announcement(ServeSettings(), 8000, key=None, token=TOKEN) is None


def test_orders_travel_as_they_are() -> None:
    order = Order("ein Apfel", "nano", seed=3, loras=("a:0.5",), guidance=2.5, mask="m.png")
    assert Order.from_json(order.to_json()) == order
    with pytest.raises(OrderError, match="prompt"):
        Order.from_json('{"model": "nano"}')
    assert os.linesep not in order.to_json()
