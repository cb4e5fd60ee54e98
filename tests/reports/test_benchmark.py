"""The bench: the same seeds give the same pictures; the teacher as a student is its equal."""

from pathlib import Path

import pytest
import torch

from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.pretrain.model import random_bundle
from twostep.reports.benchmark import Bench, BenchError, evaluate_student

NUM_PICTURES = 6


@pytest.fixture(scope="module")
def teacher() -> Bundle:
    return random_bundle()


@pytest.fixture(scope="module")
def bench(teacher: Bundle) -> Bench:
    return Bench.of(teacher, num_pictures=NUM_PICTURES, steps=2, batch_size=4)


def test_the_teacher_as_its_own_student_is_as_far_as_the_floor(bench: Bench) -> None:
    teacher = bench.teacher
    reports = evaluate_student(teacher.denoiser, bench, steps=2, scale=teacher.contract.guidance)
    floor = bench.report_teacher()
    assert set(reports) == {"open", "complete"}
    for name, report in reports.items():
        assert report.num_images == NUM_PICTURES
        assert report.loyalty is not None
        assert report.loyalty.value == 1
        assert report.to_dict() == floor[name].to_dict()
        assert report.frechet_to_reference is not None
        assert report.frechet_to_reference.value > 0


def test_a_student_in_training_mode_is_drawn_in_evaluation_mode_and_left_so(bench: Bench) -> None:
    network = bench.teacher.denoiser.network
    before = evaluate_student(bench.teacher.denoiser, bench, steps=1)
    network.train()
    again = evaluate_student(bench.teacher.denoiser, bench, steps=1)
    assert network.training
    network.eval()
    assert again["open"].to_dict() == before["open"].to_dict()


def test_batches_make_no_difference_and_fresh_noise_does(bench: Bench) -> None:
    tasks = bench.tasks["open"]
    whole = bench.draw(bench.teacher.denoiser, tasks, steps=1)
    alone = torch.cat([bench.draw(bench.teacher.denoiser, [task], steps=1) for task in tasks])
    # Batches of another size are rounded apart, which moves single levels.
    assert (whole.int() - alone.int()).abs().max() <= 1
    fresh = bench.fresh["open"].features
    assert not torch.equal(fresh, bench.own["open"].features)


def test_what_was_drawn_is_read_from_the_cache(teacher: Bundle, tmp_path: Path) -> None:
    counts: list[int] = []
    benches = [
        Bench.of(teacher, num_pictures=2, steps=1, cache=tmp_path, on_batch=counts.append)
        for _ in range(2)
    ]
    assert len(list(tmp_path.iterdir())) == 4
    assert counts == [2] * 8
    first, second = (each.own_pictures["open"] for each in benches)
    assert torch.equal(first, second)
    for path in tmp_path.iterdir():
        path.write_bytes(b"half a file")
    with pytest.raises(BenchError, match="is damaged"):
        benches[0].draw_teacher(benches[0].tasks["open"], steps=1)
    # Other weights are other pictures.
    benches[0].draw(random_bundle(seed=1).denoiser, benches[0].tasks["open"], steps=1)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_student_is_no_teacher() -> None:
    with pytest.raises(BenchError, match="needs the teacher"):
        Bench.of(load_bundle("nano", steps=2), num_pictures=2)
