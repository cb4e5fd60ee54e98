"""Jobs in a file: they outlive the server, and each ends once."""

import threading
from pathlib import Path

import pytest

from tests.serve.conftest import APPLE, FakeStudio
from tests.serve.killing import under_fire
from twostep.pipeline.request import RequestError
from twostep.serve.catalogue import Catalogue
from twostep.serve.engine import Engine
from twostep.serve.serving import Serving
from twostep.serve.shapes import JobAnswer, JobBody
from twostep.serve.store import JobStore, StoredJob, StoreError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


def stored(job_id: str, **values: object) -> StoredJob:
    return StoredJob(job_id, "me", JobBody.model_validate({"prompt": APPLE, "seed": 1} | values))


def answer(job_id: str) -> JobAnswer:
    return JobAnswer(id=job_id, state="done", seed=1, events="", seeds=[1])


def test_what_is_unfinished_is_there_in_order_when_the_file_is_opened_again(path: Path) -> None:
    store = JobStore(path)
    for name in ("b", "a", "c", "refused"):
        store.add(stored(name))
    store.drop("refused")
    store.finish(answer("a"), [b"one", b"two"])
    store.finish(answer("a"), [b"again"])  # an end is written once
    store.finish(answer("unknown"), [b"x"])
    with pytest.raises(StoreError, match="another server"):
        JobStore(path)
    store.close()
    store = JobStore(path)
    assert store.unfinished() == [stored("b"), stored("c")]
    assert store.find("a") == answer("a")
    assert [store.image("a", i) for i in range(3)] == [b"one", b"two", None]
    assert (store.find("b"), store.find("unknown"), store.image("unknown", 0)) == (None,) * 3
    store.close()


def test_the_oldest_ends_are_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twostep.serve.store.MAX_STORED_ENDS", 2)
    store = JobStore(path)
    store.add(stored("unfinished"))
    for name in ("a", "b", "c"):
        store.add(stored(name))
        store.finish(answer(name), [b"x"])
    assert [store.find(name) is None for name in ("a", "b", "c")] == [True, False, False]
    assert [store.image(name, 0) for name in ("a", "c")] == [None, b"x"]
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
