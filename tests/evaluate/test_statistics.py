"""Histograms, the kernel distance and bootstrap intervals, computed another way."""

import pytest
import torch

from twostep.evaluate.bootstrap import Resamples
from twostep.evaluate.histograms import HistogramError, histogram, total_variation
from twostep.evaluate.kernel_distance import (
    KernelDistanceError,
    kernel_distance,
    kernel_influences,
)


def test_total_variation_is_the_share_that_must_move():
    p = histogram(torch.tensor([0, 0, 1, 2]), 4)
    q = histogram(torch.tensor([0, 1, 1, 3]), 4)
    assert p.tolist() == [0.5, 0.25, 0.25, 0]
    assert total_variation(p, q).item() == pytest.approx(0.5)
    assert total_variation(p, p).item() == 0
    apart = histogram(torch.tensor([3]), 4)
    assert total_variation(p, apart).item() == 1
    with pytest.raises(HistogramError, match="at least one"):
        histogram(torch.tensor([], dtype=torch.int64), 4)


def test_the_kernel_distance_is_the_sum_over_pairs():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 3, generator=generator).double()
    b = torch.randn(4, 3, generator=generator).double() + 0.3

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    within_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(kernel(x, y) for x in a for y in b) / 20
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)


def test_the_kernel_distance_is_unbiased_where_there_is_none():
    generator = torch.Generator().manual_seed(1)
    distances = torch.tensor(
        [
            kernel_distance(
                torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
            )
            for _ in range(400)
        ]
    )
    # Within three standard errors; a biased estimate would be about one deviation off.
    assert abs(distances.mean()) < 3 * distances.std() / 400**0.5


def test_paired_sets_leave_out_what_shows_the_same_prompt():
    generator = torch.Generator().manual_seed(9)
    prompts = torch.randn(300, 4, generator=generator)
    a = prompts + 0.3 * torch.randn(300, 4, generator=generator)
    b = prompts + 0.3 * torch.randn(300, 4, generator=generator)
    between = (a.double() @ b.double().T / 4 + 1) ** 3
    difference = kernel_distance(a, b, paired=True) - kernel_distance(a, b)
    off_diagonal = (between.sum() - between.diagonal().sum()) / (300 * 299)
    assert difference == pytest.approx(float(2 * (between.mean() - off_diagonal)))
    # Pictures of one prompt are alike: counting them makes the sets look nearer than they are.
    assert difference > 0
    with pytest.raises(KernelDistanceError, match="not paired"):
        kernel_distance(a, b[:9], paired=True)


@pytest.mark.parametrize("paired", [False, True])
def test_kernel_influences_are_the_derivative_by_the_samples_weights(paired: bool):
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(40, 3, generator=generator).double()
    b = torch.randn(40, 3, generator=generator).double() + 0.5
    of_a, of_b = kernel_influences(a, b, paired=paired)
    assert of_a.mean().abs() < 1e-12
    assert of_b.mean().abs() < 1e-12
    # Leaving a sample out moves a statistic by minus its influence over n - 1.
    for i in (0, 7):
        rest = torch.cat([a[:i], a[i + 1 :]])
        moved = kernel_distance(rest, b) - kernel_distance(a, b)
        assert moved == pytest.approx(-float(of_a[i]) / 39, rel=0.15, abs=2e-3)
        rest = torch.cat([b[:i], b[i + 1 :]])
        moved = kernel_distance(a, rest) - kernel_distance(a, b)
        assert moved == pytest.approx(-float(of_b[i]) / 39, rel=0.15, abs=2e-3)


def test_features_without_a_distance_are_refused():
    with pytest.raises(KernelDistanceError, match="at least 2 samples"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(KernelDistanceError, match="as many features"):
        kernel_distance(torch.zeros(4, 2), torch.zeros(4, 3))


def test_an_interval_is_as_wide_as_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    estimate = Resamples(range(400), count=4000).mean(values)
    error = float(values.std()) / 20
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.1 * error)


def test_pictures_of_one_prompt_are_drawn_together():
    """Four copies of each picture say no more than one: the interval stays as wide."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(4)).double()
    once = Resamples(range(100)).mean(values)
    prompts = [index // 4 for index in range(400)]
    copied = Resamples(prompts).mean(values.repeat_interleave(4))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """200 samples of 60 coin tosses; 95 % of 200 is 190, with a deviation of 3."""
    generator = torch.Generator().manual_seed(5)
    tosses = (torch.rand(200, 60, generator=generator) < 0.3).double()
    resamples = Resamples(range(60))
    covered = 0
    for values in tosses:
        estimate = resamples.mean(values)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 178 <= covered <= 199


def test_only_what_is_chosen_counts():
    values = torch.tensor([1.0, 3.0, 100.0])
    chosen = torch.tensor([True, True, False])
    estimate = Resamples(range(3)).mean(values, chosen)
    assert estimate.value == 2
    assert estimate.high <= 3


def test_the_same_seed_gives_the_same_interval():
    values = torch.rand(30, generator=torch.Generator().manual_seed(6))
    assert Resamples(range(30)).mean(values) == Resamples(range(30)).mean(values)
    assert Resamples(range(30), seed=1).mean(values) != Resamples(range(30)).mean(values)


def test_one_prompt_gives_no_interval():
    estimate = Resamples(["a", "a"]).mean(torch.tensor([1.0, 2.0]))
    assert (estimate.value, estimate.low, estimate.high) == (1.5, None, None)


def test_variations_are_those_of_the_histograms():
    generator = torch.Generator().manual_seed(7)
    classes = torch.randint(4, (200,), generator=generator)
    others = torch.randint(3, (200,), generator=generator)
    chosen = torch.arange(200) % 2 == 0
    resamples = Resamples(range(200))
    uniform = torch.full((4,), 0.25).double()
    to_uniform = resamples.variation(classes, None, chosen, 4)
    expected = total_variation(histogram(classes[chosen], 4), uniform)
    assert to_uniform.value == pytest.approx(float(expected))
    to_others = resamples.variation(classes, others, chosen, 4)
    expected = total_variation(histogram(classes[chosen], 4), histogram(others[chosen], 4))
    assert to_others.value == pytest.approx(float(expected))
    assert 0 <= to_uniform.low <= to_uniform.value
    assert to_others.low < to_others.value < to_others.high


def test_a_moved_figure_has_the_spread_of_its_influences():
    influences = torch.randn(500, generator=torch.Generator().manual_seed(8)).double()
    influences -= influences.mean()
    estimate = Resamples(range(500), count=4000).moved(7.0, influences)
    assert estimate.value == 7
    error = float(influences.std()) / 500**0.5
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_a_figure_of_two_sets_varies_with_both_unless_they_have_the_same_prompts():
    generator = torch.Generator().manual_seed(2)
    ours = torch.randn(400, generator=generator)
    theirs = torch.randn(100, generator=generator)
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    resamples = Resamples(range(400), count=4000)
    others = Resamples(range(100), count=4000, seed=1)
    apart = resamples.moved_by_both(7.0, ours, theirs, others)
    # Standard errors of 1/20 and 1/10 are those of two means that vary apart.
    expected = 1.96 * (float(ours.var()) / 400 + float(theirs.var()) / 100) ** 0.5
    assert (apart.low, apart.high) == pytest.approx((7 - expected, 7 + expected), rel=0.01)
    assert apart.high - apart.low == pytest.approx(2 * expected, rel=0.08)
    # What each prompt moves in one set it takes back in the other.
    together = resamples.moved_by_both(7.0, ours, -ours)
    assert (together.low, together.high) == (7.0, 7.0)
