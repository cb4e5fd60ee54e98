"""The judge: it learns, it survives the disk, it refuses what it cannot judge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.errors import TwostepError
from twostep.evaluate.judge import (
    BUILT_IN,
    Judge,
    JudgeError,
    check_pictures,
    load_judge,
    save_judge,
)
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.judge import JudgeSettings, classes_of, measure_accuracy, train_judge
from twostep.pretrain.parts import RECIPES
from twostep.training.loop import TrainingError
from twostep.training.recipe import load_recipe
from twostep.training.run_folder import RunError

from .conftest import QUICK

COMMITTED = RECIPES / "nano-judge.toml"


def _with_loop(**changes: float) -> JudgeSettings:
    return QUICK.model_copy(update={"loop": QUICK.loop.model_copy(update=changes)})


@pytest.mark.slow
def test_it_learns_the_sample_in_seconds(quick_judge: Judge):
    assert quick_judge.origin is not None
    accuracy = quick_judge.origin.accuracy
    assert accuracy["concept"] > 0.8  # chance is 1/8, 1/12, 1/4
    assert accuracy["background"] > 0.7
    assert accuracy["style"] > 0.35


@pytest.mark.slow
def test_the_run_folder_says_what_happened(quick_run: Path):
    figures = json.loads((quick_run / "eval.json").read_text())
    lines = [json.loads(line) for line in (quick_run / "log.jsonl").read_text().splitlines()]
    assert {"concept", "style", "background", "concept_damaged", "blur_error_pixels"} <= set(
        figures
    )
    assert [line["iteration"] for line in lines] == [20, 40, 60, 80, 100, 120]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_judge(emoji: DrawingSet, quick_run: Path, tmp_path: Path):
    class Killed(Exception):
        pass

    def kill(done: int, figures: dict[str, float]) -> None:
        if done == 70:
            raise Killed

    with pytest.raises(Killed):
        train_judge(QUICK, emoji, tmp_path / "run", kill)
    seen: list[int] = []
    resumed = train_judge(QUICK, emoji, tmp_path / "run", lambda done, figures: seen.append(done))
    whole = load_judge(quick_run / "judge.safetensors")
    assert seen == list(range(51, 121))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(emoji: DrawingSet, quick_run: Path):
    seen: list[int] = []
    train_judge(QUICK, emoji, quick_run, lambda done, figures: seen.append(done))
    assert seen == []


@pytest.mark.slow
def test_the_folder_of_another_recipe_is_refused(emoji: DrawingSet, quick_run: Path):
    with pytest.raises(RunError, match="another recipe"):
        train_judge(_with_loop(seed=1), emoji, quick_run)


def test_a_loss_that_is_no_number_stops_the_training(emoji: DrawingSet, tmp_path: Path):
    broken = _with_loop(learning_rate=1e30, warmup_iterations=0)
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train_judge(broken, emoji, tmp_path / "run")


@pytest.mark.slow
def test_saved_and_loaded_it_judges_the_same(emoji: DrawingSet, quick_judge: Judge, tmp_path: Path):
    save_judge(quick_judge, tmp_path / "judge.safetensors")
    loaded = load_judge(tmp_path / "judge.safetensors")
    images = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(loaded.judge(images).concept, quick_judge.judge(images).concept)
    assert loaded.classes == quick_judge.classes == classes_of(emoji)
    assert loaded.origin == quick_judge.origin
    assert loaded.real is not None
    assert quick_judge.real is not None
    assert torch.equal(loaded.real.covariance, quick_judge.real.covariance)


@pytest.mark.slow
def test_the_verdict_does_not_depend_on_the_batch(quick_judge: Judge):
    images = torch.rand(130, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = quick_judge.judge(images)
    torch.testing.assert_close(quick_judge.judge(images[129:]).features, whole.features[129:])


def test_it_sees_blur(emoji: DrawingSet, judge: Judge):
    from twostep.pretrain.degradation import blur
    from twostep.pretrain.prompt_sets import complete_tasks, real_pictures

    pictures = real_pictures(
        [task.attributes for task in complete_tasks(emoji.concepts, 64)], emoji
    )
    blurred = blur(pictures, torch.full((64,), 1.2))
    assert judge.judge(blurred).blur_pixels.mean() > judge.judge(pictures).blur_pixels.mean() + 0.4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "expected floating-point pictures"),
        (torch.zeros(3, 64, 64), "expected floating-point pictures"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.float32)[:0], "no pictures"),
        (torch.full((2, 3, 64, 64), float("nan")), "2 of 2 pictures hold NaN"),
        (torch.full((1, 3, 64, 64), 255.0), "expected -1..1"),
    ],
)
def test_what_cannot_be_judged_is_refused(images: torch.Tensor, message: str):
    with pytest.raises(JudgeError, match=message):
        check_pictures(images)


def test_what_is_no_judge_is_refused(tmp_path: Path, emoji: DrawingSet):
    with pytest.raises(JudgeError, match="no judge at"):
        load_judge(tmp_path / "missing.safetensors")
    save_file({"drawings": emoji.drawings}, tmp_path / "foreign.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(BUILT_IN.read_bytes()[:5000])
    for path in (tmp_path / "foreign.safetensors", truncated, tmp_path / "garbage.safetensors"):
        if not path.exists():
            path.write_bytes(b"no tensors here")
        with pytest.raises(TwostepError, match="no judge, or a damaged one"):
            load_judge(path)


def test_the_committed_recipe_is_accepted():
    assert load_recipe(COMMITTED, JudgeSettings).name == "nano-judge"


def test_the_built_in_judge_is_small_and_states_its_accuracy(judge: Judge):
    assert BUILT_IN.stat().st_size <= 1_500_000
    assert judge.origin is not None
    assert judge.origin.accuracy["concept"] >= 0.98
    assert judge.origin.accuracy["style"] >= 0.995
    assert judge.origin.accuracy["background"] >= 0.995
    assert judge.real is not None


def test_the_built_in_judge_knows_the_sample(emoji: DrawingSet, judge: Judge):
    """It never saw these half-sized drawings; what it states of itself must hold for them too."""
    from twostep.evaluate.metrics import evaluate
    from twostep.pretrain.prompt_sets import complete_tasks, real_pictures

    wishes = [task.attributes for task in complete_tasks(emoji.concepts, 128)]
    report = evaluate(real_pictures(wishes, emoji), wishes, judge)
    assert report.concept.num_right >= 125
    assert report.style.num_right >= 125
    assert report.background.num_right >= 125


@pytest.mark.slow
def test_accuracy_is_measured_on_pictures_that_are_the_same_every_time(
    quick_judge: Judge, emoji: DrawingSet
):
    assert quick_judge.origin is not None
    assert measure_accuracy(quick_judge, QUICK, emoji) == quick_judge.origin.accuracy
