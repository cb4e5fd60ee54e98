"""The report: right answers counted as right, wrong ones as wrong, bad input named."""

import json

import pytest
import torch
from nano_tasks import complete_tasks, real_pictures

from twostep.evaluate.attributes import Attributes
from twostep.evaluate.frechet import FrechetError
from twostep.evaluate.judge import Judge, JudgeError
from twostep.evaluate.metrics import EvaluationError, evaluate
from twostep.pretrain.drawings import DrawingSet

FOX, APPLE = Attributes(("fox",), "flat", "blue"), Attributes(("red apple",), "3d", "green")


@pytest.fixture(scope="module")
def foxes(emoji: DrawingSet) -> torch.Tensor:
    return real_pictures([FOX] * 4, emoji)


def test_wrong_wishes_score_nothing(foxes: torch.Tensor, judge: Judge):
    report = evaluate(foxes, [APPLE] * 4, judge)
    assert (report.concept.num_right, report.concept.num_asked) == (0, 4)
    assert report.background.num_right == 0


def test_only_what_the_prompt_names_is_scored(foxes: torch.Tensor, judge: Judge):
    report = evaluate(foxes, [FOX, Attributes(), Attributes(("animal",)), None], judge)
    assert report.concept.num_asked == report.style.num_asked == report.background.num_asked == 1
    assert report.subgroup.num_asked == 1
    assert report.num_unknown == 1
    assert evaluate(foxes, [None] * 4, judge).concept.share is None


def test_any_concept_of_the_subgroup_answers_it(foxes: torch.Tensor, judge: Judge):
    report = evaluate(foxes, [Attributes(("animal",))] * 4, judge)
    assert (report.subgroup.num_right, report.subgroup.num_asked) == (4, 4)
    assert report.concept.num_asked == 0
    assert evaluate(foxes, [Attributes(("fruit",))] * 4, judge).subgroup.num_right == 0


def test_right_wishes_score_all(foxes: torch.Tensor, judge: Judge):
    report = evaluate(foxes, [FOX] * 4, judge)
    assert report.concept.share == report.style.share == report.background.share == 1


def test_the_distance_to_itself_is_zero_and_more_blur_is_farther(emoji: DrawingSet, judge: Judge):
    from twostep.pretrain.degradation import blur

    wishes = [task.attributes for task in complete_tasks(emoji.concepts, 192)]
    pictures = real_pictures(wishes, emoji)
    reference = judge.statistics(pictures)
    same = evaluate(pictures, wishes, judge, reference=reference)
    mild, strong = (
        evaluate(blur(pictures, torch.full((192,), pixels)), wishes, judge, reference=reference)
        for pixels in (1.2, 2.4)
    )
    assert same.frechet_to_reference == pytest.approx(0, abs=1e-6)
    assert same.frechet_to_real is None
    again = evaluate(real_pictures(wishes, emoji, seed=1), wishes, judge, reference=reference)
    # Other placements of the same drawings lie far nearer than blurred ones in the same places; few
    # samples hide that.
    assert again.frechet_to_reference is not None
    assert mild.frechet_to_reference is not None
    assert strong.frechet_to_reference is not None
    assert 2 * again.frechet_to_reference < mild.frechet_to_reference < strong.frechet_to_reference
    assert same.mean_blur_pixels < mild.mean_blur_pixels < strong.mean_blur_pixels


def test_diversity_is_measured_between_pictures_of_one_wish(foxes: torch.Tensor, judge: Judge):
    assert evaluate(foxes, [FOX] * 4, judge).pixel_diversity > 0
    assert evaluate(foxes[:1].repeat(4, 1, 1, 1), [FOX] * 4, judge).pixel_diversity == 0
    assert evaluate(foxes[:1], [FOX], judge).feature_diversity is None


def test_a_report_becomes_json(foxes: torch.Tensor, judge: Judge):
    values = json.loads(json.dumps(evaluate(foxes, [FOX] * 4, judge).to_dict()))
    assert values["concept"]["share"] == values["concept"]["num_right"] / 4


def test_bad_input_is_named(foxes: torch.Tensor, judge: Judge):
    with pytest.raises(EvaluationError, match="one wish per picture"):
        evaluate(foxes, [FOX], judge)
    with pytest.raises(EvaluationError, match="dragon"):
        evaluate(foxes, [Attributes(("dragon",))] * 4, judge)
    with pytest.raises(JudgeError, match="no pictures"):
        evaluate(foxes[:0], [], judge)
    broken = foxes.clone()
    broken[2, 0, 0, 0] = float("nan")
    with pytest.raises(JudgeError, match=r"1 of 4 pictures hold NaN or infinity \(number 2\)"):
        evaluate(broken, [FOX] * 4, judge)
    with pytest.raises(FrechetError, match="at least 2 samples"):
        evaluate(foxes[:1], [FOX], judge, reference=judge.real)
