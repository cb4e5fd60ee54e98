"""Models and LoRAs that come, change and go under a running server; none is read half written."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import twostep
from tests.serve.conftest import APPLE
from twostep.formats.locate import ModelError
from twostep.pipeline.request import Request, RequestError
from twostep.pipeline.studio import Studio
from twostep.serve.catalogue import Catalogue, UnknownModelError, Wish
from twostep.serve.reloading import Reloader, Watch

NANO = Path(twostep.__file__).parent / "weights" / "nano"
STUDENTS = sorted((NANO / "students").glob("*_unet.safetensors"))
LORA = next((NANO / "students").glob("*_lora.safetensors"))


class Forgetful:
    """Notes what it should forget."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, model: str) -> None:
        self.forgotten.append(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def put(source: Path, place: Path) -> Path:
    """Copy a file so that it appears whole."""
    partial = place.with_name(f"{place.name}.0f.partial")
    shutil.copy(source, partial)
    return partial.rename(place)


def started(
    folder: Path, *models: str, lora_folders: tuple[Path, ...] = ()
) -> tuple[Catalogue, Forgetful, Callable[[], None]]:
    """A catalogue over a folder, what forgets, and what looks until all is settled."""
    watch = Watch(models or ["nano"], (), [folder], lora_folders, settled_seconds=0.0)
    catalogue = Catalogue(watch.stock())
    studio = Forgetful()
    reloader = Reloader(watch, catalogue, [studio], 0.0)

    def look() -> None:
        reloader.look()
        reloader.look()

    return catalogue, studio, look


def names(catalogue: Catalogue) -> list[str]:
    return [served.name for served in catalogue.served if served.steps is None]


def test_models_come_change_and_go(folder: Path) -> None:
    catalogue, studio, look = started(folder)
    assert names(catalogue) == ["nano"]
    place = put(STUDENTS[0], folder / "mine.safetensors")
    look()
    assert names(catalogue) == ["nano", "mine"]
    first = catalogue.find("mine").contracts[0]
    # Another student takes its place: the contract is the new one's, and the old one is forgotten.
    studio.forgotten.clear()
    put(STUDENTS[1], place)
    look()
    second = catalogue.find("mine").contracts[0]
    assert (first.steps, second.steps) == (
        int(STUDENTS[0].stem.split("_")[1].removesuffix("step")),
        int(STUDENTS[1].stem.split("_")[1].removesuffix("step")),
    )
    assert studio.forgotten == [str(place)]
    place.unlink()
    look()
    assert names(catalogue) == ["nano"]
    with pytest.raises(UnknownModelError):
        catalogue.find("mine")
    assert catalogue.fit(Wish("x"), strict=True).served.name == "nano"


def test_one_look_is_not_enough_and_nothing_is_read_half_written(folder: Path) -> None:
    watch = Watch(["nano"], (), [folder], settled_seconds=0.0)
    data = STUDENTS[0].read_bytes()
    place = folder / "mine.safetensors"
    for share in (0.1, 0.5, 0.999):
        place.write_bytes(data[: int(share * len(data))])
        for _ in range(3):  # it rests between two writes, as a slow copy does
            assert watch.look() == []
        assert watch.is_settled
    place.write_bytes(data)
    assert watch.look() == []
    assert not watch.is_settled
    # Of the right size, but written to since: that takes a look more.
    time.sleep(0.01)
    os.utime(place)
    assert watch.look() == []
    assert watch.look() == [str(place)]
    assert "mine" in watch.stock().served


def test_a_model_that_is_written_over_keeps_its_contract_and_is_not_read(folder: Path) -> None:
    place = put(STUDENTS[0], folder / "mine.safetensors")
    os.utime(place, (1, 1))
    watch = Watch(["nano"], (), [folder], settled_seconds=1.0)
    assert "mine" in watch.stock().served  # it has been as it is for long
    watch.check(str(place))
    watch.check("nano")
    data = place.read_bytes()
    place.write_bytes(data[:1000])
    watch.look()
    assert "mine" in watch.stock().served
    with pytest.raises(ModelError, match=r"mine.safetensors is being replaced"):
        watch.check(str(place))


def test_damaged_models_are_left_out_and_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue, _, look = started(folder)
    (folder / "broken.safetensors").write_bytes(b"no weights at all")
    (folder / "half").mkdir()
    (folder / "half" / "twostep.json").write_text("{")
    for _ in range(3):
        look()
    assert names(catalogue) == ["nano"]
    for name in ("broken", "half"):
        (said,) = [each for each in caplog.messages if f"/{name}" in each.split(" is left out")[0]]
        assert "left out" in said


def test_links_that_lead_out_are_not_followed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret"
    shutil.copytree(NANO, secret, ignore=shutil.ignore_patterns("students"))
    (folder / "whole").symlink_to(secret)
    (folder / "file.safetensors").symlink_to(STUDENTS[0])
    (folder / "parts").mkdir()
    for path in secret.iterdir():
        (folder / "parts" / path.name).symlink_to(path)
    shutil.copytree(secret, folder / ".hidden")
    inside = put(STUDENTS[0], folder / "inside.safetensors")
    (folder / "again.safetensors").symlink_to(inside)  # as volumes and caches have them
    catalogue, _, look = started(folder)
    look()
    assert names(catalogue) == ["nano", "again", "inside"]
    told = [each for each in caplog.messages if "leads out" in each]
    assert [Path(each.split()[0]).name for each in told] == ["file.safetensors", "parts", "whole"]


def test_what_is_named_comes_before_what_is_found(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(STUDENTS[0], folder / "nano.safetensors")
    named = put(STUDENTS[1], folder.parent / "own.safetensors")
    catalogue, studio, look = started(folder, "nano", str(named))
    look()
    assert catalogue.find("nano").model == "nano"
    assert names(catalogue)[:2] == ["nano", "own"]
    assert any(
        "nano.safetensors is left out: nano has its name" in each for each in caplog.messages
    )
    # What was named by its path is watched too.
    named.unlink()
    look()
    assert names(catalogue) == ["nano"]
    put(STUDENTS[0], named)
    look()
    assert names(catalogue) == ["nano", "own"]
    assert studio.forgotten.count(str(named)) == 2


def test_a_folder_of_models_may_be_given_as_a_model(folder: Path) -> None:
    shutil.copytree(NANO, folder / "a", ignore=shutil.ignore_patterns("students"))
    watch = Watch([str(folder)], settled_seconds=0.0)
    watch.look()
    watch.look()
    assert [served.model for served in watch.stock().served.values()] == [str(folder / "a")]
    with pytest.raises(ModelError, match="none is no folder"):
        Watch(["nano"], (), [folder / "none"])


def test_loras_come_and_go(folder: Path, tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    catalogue, _, look = started(folder, lora_folders=(loras,))
    wish = Wish("x", loras=("ink:0.5",))
    with pytest.raises(RequestError, match="no LoRA 'ink'; there are none"):
        catalogue.fit(wish, strict=False)
    place = put(LORA, loras / "ink.safetensors")
    look()
    (choice,) = catalogue.fit(wish, strict=False).request.loras
    assert str(choice) == f"{place}:0.5"
    place.unlink()
    look()
    assert catalogue.loras == []


def test_a_signal_wakes_the_watch_that_never_looks_by_itself(folder: Path) -> None:
    watch = Watch(["nano"], (), [folder], settled_seconds=0.1)
    catalogue = Catalogue(watch.stock())
    reloader = Reloader(watch, catalogue, [], 0.0)
    put(STUDENTS[0], folder / "mine.safetensors")
    time.sleep(0.3)
    assert names(catalogue) == ["nano"]
    reloader.wake()
    end = time.monotonic() + 30
    while "mine" not in names(catalogue):
        assert time.monotonic() < end
        time.sleep(0.05)
    reloader.close()


def test_catching_up_waits_for_what_settles_and_not_for_what_does_not(folder: Path) -> None:
    watch = Watch(["nano"], (), [folder], settled_seconds=0.2)
    catalogue = Catalogue(watch.stock())
    reloader = Reloader(watch, catalogue, [], 0.0)
    put(STUDENTS[0], folder / "mine.safetensors")
    assert reloader.catch_up(30.0)
    assert names(catalogue) == ["nano", "mine"]
    put(STUDENTS[0], folder / "other.safetensors")
    start = time.monotonic()
    assert not reloader.catch_up(0.1)
    assert time.monotonic() - start < 5
    reloader.close()


@pytest.mark.slow
def test_a_job_ends_on_the_model_it_began_with(folder: Path) -> None:
    place = put(STUDENTS[0], folder / "mine.safetensors")
    other = put(STUDENTS[1], folder / "other.safetensors")
    watch = Watch([str(place)], settled_seconds=0.0)
    studio = Studio("cpu", check=watch.check)
    request = Request(APPLE, model=str(place), seed=3)
    (old,) = studio.draw(request).images
    has_begun = threading.Event()
    has_changed = threading.Event()

    def on_step(_: object) -> None:
        has_begun.set()
        assert has_changed.wait(60)

    drawn: list[object] = []
    thread = threading.Thread(
        target=lambda: drawn.extend(studio.draw(request, on_step=on_step).images)
    )
    thread.start()
    assert has_begun.wait(60)
    # Written over in place, so that even a file in memory would change under the network.
    with place.open("r+b") as file:
        file.write(other.read_bytes())
        file.truncate()
    watch.look()
    assert watch.look() == [str(place)]
    studio.forget(str(place))
    has_changed.set()
    thread.join()
    (ended,) = drawn
    assert ended == old
    (new,) = studio.draw(request).images
    (expected,) = Studio("cpu").draw(Request(APPLE, model=str(other), seed=3)).images
    assert new == expected != old
