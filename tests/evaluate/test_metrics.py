"""The report: right answers counted as right, wrong ones as wrong, bad input named."""

import json

import pytest
import torch

from twostep.evaluate.attributes import BACKGROUNDS, Attributes
from twostep.evaluate.frechet import FrechetError
from twostep.evaluate.judge import Judge, JudgeError
from twostep.evaluate.measurements import EvaluationError, Measurements, measure
from twostep.evaluate.metrics import evaluate
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.prompt_sets import complete_tasks, open_tasks, real_pictures

FOX, APPLE = Attributes(("fox",), "flat", "blue"), Attributes(("red apple",), "3d", "green")


@pytest.fixture(scope="module")
def foxes(emoji: DrawingSet) -> torch.Tensor:
    return real_pictures([FOX] * 4, emoji)


def test_wrong_attributes_score_nothing(foxes: torch.Tensor, judge: Judge):
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


def test_right_attributes_score_all(foxes: torch.Tensor, judge: Judge):
    report = evaluate(foxes, [FOX] * 4, judge)
    assert report.concept.share == report.style.share == report.background.share == 1


def test_the_distance_to_itself_is_zero_and_more_blur_is_farther(emoji: DrawingSet, judge: Judge):
    from twostep.pretrain.degradation import blur

    attributes = [task.attributes for task in complete_tasks(emoji.concepts, 192)]
    pictures = real_pictures(attributes, emoji)
    reference = measure(pictures, attributes, judge)
    same = evaluate(pictures, attributes, judge, reference=reference)
    mild, strong = (
        evaluate(blur(pictures, torch.full((192,), pixels)), attributes, judge, reference=reference)
        for pixels in (1.2, 2.4)
    )
    assert same.frechet_to_reference is not None
    assert same.frechet_to_reference.value == pytest.approx(0, abs=1e-6)
    assert same.frechet_to_real is None
    again = evaluate(
        real_pictures(attributes, emoji, seed=1), attributes, judge, reference=reference
    )
    # Other placements of the same drawings lie far nearer than blurred ones in the same places; few
    # samples hide that.
    assert again.frechet_to_reference is not None
    assert mild.frechet_to_reference is not None
    assert strong.frechet_to_reference is not None
    near, middle, far = (report.frechet_to_reference.value for report in (again, mild, strong))
    assert 2 * near < middle < far
    assert same.mean_blur_pixels < mild.mean_blur_pixels < strong.mean_blur_pixels


def test_diversity_is_measured_between_pictures_of_one_prompt(foxes: torch.Tensor, judge: Judge):
    assert evaluate(foxes, [FOX] * 4, judge).pixel_diversity > 0
    assert evaluate(foxes[:1].repeat(4, 1, 1, 1), [FOX] * 4, judge).pixel_diversity == 0
    assert evaluate(foxes[:1], [FOX], judge).feature_diversity is None


def test_a_report_becomes_json(foxes: torch.Tensor, judge: Judge):
    values = json.loads(json.dumps(evaluate(foxes, [FOX] * 4, judge).to_dict()))
    assert values["concept"]["share"] == values["concept"]["num_right"] / 4


def test_bad_input_is_named(foxes: torch.Tensor, judge: Judge):
    with pytest.raises(EvaluationError, match="one per picture"):
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
        evaluate(foxes[:1], [FOX], judge, reference=measure(foxes, [FOX] * 4, judge))


@pytest.fixture(scope="module")
def open_pictures(emoji: DrawingSet) -> tuple[list[Attributes], torch.Tensor]:
    """Real pictures of prompts that leave background, style or both open."""
    attributes = [task.attributes for task in open_tasks(emoji.concepts, 72)]
    return attributes, real_pictures(attributes, emoji, seed=3)


def test_real_pictures_lie_on_the_palette_and_tinted_ones_do_not(
    open_pictures: tuple[list[Attributes], torch.Tensor], judge: Judge
):
    attributes, pictures = open_pictures
    real = evaluate(pictures, attributes, judge)
    num_open = sum(each.background is None for each in attributes)
    assert real.off_palette.num_asked == num_open == 48
    assert real.off_palette.num_right == 0
    assert real.palette_distance is not None
    assert real.palette_distance.value < 2
    tinted = evaluate((pictures * 0.6).contiguous(), attributes, judge)
    assert tinted.off_palette.share is not None
    assert tinted.off_palette.share > 0.8
    assert tinted.off_palette.low is not None
    assert 0.6 < tinted.off_palette.low < tinted.off_palette.share
    complete = evaluate(pictures[:1], [APPLE], judge)
    assert complete.off_palette.share is None
    assert complete.background_to_uniform is None


def test_a_lost_mode_shows_in_the_histograms(emoji: DrawingSet, judge: Judge):
    attributes = [Attributes(concept.names, None, None) for concept in emoji.concepts] * 4
    free = real_pictures(attributes, emoji, seed=1)
    blue = [Attributes(each.names, "flat", "blue") for each in attributes]
    reference = measure(real_pictures(attributes, emoji, seed=2), attributes, judge)
    varied = evaluate(free, attributes, judge, reference=reference)
    lost = evaluate(real_pictures(blue, emoji), attributes, judge, reference=reference)
    assert lost.background_to_uniform is not None
    assert varied.background_to_uniform is not None
    assert lost.background_to_uniform.value == pytest.approx(11 / 12)
    assert lost.style_to_uniform is not None
    assert lost.style_to_uniform.value == pytest.approx(3 / 4)
    assert varied.background_to_uniform.value < 0.4
    expected = 1 - (reference.background == list(BACKGROUNDS).index("blue")).double().mean()
    assert lost.background_to_reference is not None
    assert lost.background_to_reference.value == pytest.approx(float(expected))


def test_the_teachers_own_pictures_are_loyal_and_other_noise_is_not(
    open_pictures: tuple[list[Attributes], torch.Tensor], emoji: DrawingSet, judge: Judge
):
    attributes, pictures = open_pictures
    own = measure(pictures, attributes, judge)
    fresh = measure(real_pictures(attributes, emoji, seed=4), attributes, judge)
    same = evaluate(pictures, attributes, judge, reference=fresh, same_noise=own)
    assert same.loyalty is not None
    assert same.loyalty.value == 1
    again = evaluate(pictures, attributes, judge, reference=own)
    assert again.high_pass_ratio is not None
    assert again.high_pass_ratio.low == again.high_pass_ratio.high == 1
    other = real_pictures(attributes, emoji, seed=5)
    unlike = evaluate(other, attributes, judge, reference=fresh, same_noise=own)
    assert unlike.loyalty is not None
    assert abs(unlike.loyalty.value) < 0.15
    with pytest.raises(EvaluationError, match="the same prompts in the same order"):
        evaluate(pictures[:8], attributes[:8], judge, reference=fresh, same_noise=own)


def test_measurements_of_batches_are_those_of_the_whole(foxes: torch.Tensor, judge: Judge):
    whole = measure(foxes, [FOX] * 4, judge)
    parts = [measure(foxes[start : start + 2], [FOX] * 2, judge) for start in (0, 2)]
    joined = Measurements.cat(parts)
    assert len(joined) == 4
    assert joined.attributes == whole.attributes
    assert torch.equal(joined.background, whole.background)
    torch.testing.assert_close(joined.features, whole.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(joined.high_pass, whole.high_pass)
