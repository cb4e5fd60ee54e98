"""Jobs in a file: they outlive the server, and each ends once."""

import sqlite3
import threading
from pathlib import Path

import pytest

from tests.serve.conftest import APPLE, FakeStudio
from tests.serve.killing import under_fire
from twostep.media.codec import Encoded
from twostep.pipeline.request import RequestError
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.serving import Serving
from twostep.serve.shapes import SUFFIXES, JobAnswer, JobBody
from twostep.serve.store import JobStore, StoredItem, StoredJob, StoreError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def stored(job_id: str, **values: object) -> StoredJob:
    return StoredJob(job_id, "me", JobBody.model_validate({"prompt": APPLE, "seed": 1} | values))


def answer(job_id: str) -> JobAnswer:
    return JobAnswer(id=job_id, state="done", seed=1, events="", seeds=[1])


def item(data: bytes, mime: str = "image/png", poster: bytes | None = None) -> StoredItem:
    return StoredItem(Encoded(data, SUFFIXES[mime], mime), poster)


def test_a_file_of_the_first_version_is_read_and_goes_on(path: Path) -> None:
    """Then all items were PNGs."""
    rows = sqlite3.connect(path)
    rows.executescript(
        "CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
        " client TEXT NOT NULL, body TEXT, answer TEXT);"
        "CREATE TABLE images (id TEXT NOT NULL REFERENCES jobs(id) ON DELETE CASCADE,"
        " place INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (id, place));"
        "PRAGMA user_version = 1;"
    )
    done = (answer("old").model_dump_json(), b"a PNG")
    rows.execute("INSERT INTO jobs (id, client, answer) VALUES ('old', 'me', ?)", done[:1])
    rows.execute("INSERT INTO images VALUES ('old', 0, ?)", done[1:])
    rows.commit()
    rows.close()
    for name in ("new", "newer"):  # the second time it is of today's version
        store = JobStore(path)
        assert (store.find("old"), store.item("old", 0)) == (answer("old"), item(b"a PNG"))
        store.add(stored(name))
        store.finish(answer(name), [item(b"a sound", "audio/wav", b"shown")])
        assert store.item(name, 0) == item(b"a sound", "audio/wav", b"shown")
        store.close()


def test_what_is_unfinished_is_there_in_order_when_the_file_is_opened_again(path: Path) -> None:
    store = JobStore(path)
    for name in ("b", "a", "c", "refused"):
        store.add(stored(name))
    store.drop("refused")
    store.finish(answer("a"), [item(b"one"), item(b"two", "audio/wav", b"shown")])
    store.finish(answer("a"), [item(b"again")])  # an end is written once
    store.finish(answer("unknown"), [item(b"x")])
    with pytest.raises(StoreError, match="another server"):
        JobStore(path)
    store.close()
    store = JobStore(path)
    assert store.unfinished() == [stored("b"), stored("c")]
    assert store.find("a") == answer("a")
    found = [store.item("a", i) for i in range(3)]
    assert found == [item(b"one"), item(b"two", "audio/wav", b"shown"), None]
    assert (store.find("b"), store.find("unknown"), store.item("unknown", 0)) == (None,) * 3
    store.close()


def test_the_oldest_ends_are_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostep.serve.store.MAX_STORED_ENDS", 2)
    store = JobStore(path)
    store.add(stored("unfinished"))
    for name in ("a", "b", "c"):
        store.add(stored(name))
        store.finish(answer(name), [item(b"x")])
    assert [store.find(name) is None for name in ("a", "b", "c")] == [True, False, False]
    assert [store.item(name, 0) for name in ("a", "c")] == [None, item(b"x")]
    assert store.unfinished() == [stored("unfinished")]
    store.close()


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, and no database" * 40)
    with pytest.raises(StoreError, match="another file"):
        JobStore(path)
    assert path.read_text().startswith("these are notes")


def test_jobs_of_before_are_drawn_or_reported(path: Path) -> None:
    store = JobStore(path)
    for i in range(5):
        store.add(stored(str(i), steps=1))
    store.add(stored("impossible", steps=77))
    fake = FakeStudio()
    engine = Engine([fake], max_waiting=1, observers=[store])
    assert Serving(engine, Catalogue(["nano"]), store=store).resume() == 6
    fake.steps.release(100)
    jobs = [engine.find(str(i)) for i in range(5)]
    for job in jobs:
        assert job is not None
        with pytest.raises(RequestError):
            job.wait(10.0)
    engine.close(10.0)
    assert store.unfinished() == []
    ends = [store.find(name) for name in (*map(str, range(5)), "impossible")]
    assert [end.state for end in ends if end is not None] == ["failed"] * 6
    assert ends[-1] is not None
    assert "77" in str(ends[-1].error)
    store.close()


def test_what_a_shutdown_ends_stays_unfinished(path: Path) -> None:
    store = JobStore(path)
    store.add(stored("a"))
    fake = FakeStudio()
    engine = Engine([fake], observers=[store])
    Serving(engine, Catalogue(["nano"]), store=store).resume()
    assert fake.busy.acquire(timeout=10)
    threading.Timer(0.2, fake.steps.release, [1]).start()
    engine.close(0.0)
    assert store.unfinished() == [stored("a")]
    store.close()


@pytest.mark.slow
def test_accepted_jobs_survive_kills(path: Path) -> None:
    accepted = under_fire(path, kills=3, seed=0)
    assert len(accepted) >= 9
