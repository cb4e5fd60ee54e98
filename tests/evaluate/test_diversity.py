"""Diversity between the pictures of one prompt."""

import pytest
import torch

from twostep.evaluate.diversity import DiversityError, feature_diversity, pixel_diversity


def test_it_is_the_mean_distance_within_a_prompt_averaged_over_prompts():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    assert feature_diversity(features, ["a", "a", "b", "b", "b"]) == pytest.approx(
        (5 + (1 + 2 + 1) / 3) / 2
    )


def test_the_same_picture_from_every_seed_has_none():
    assert feature_diversity(torch.ones(4, 3), ["a"] * 4) == 0


def test_a_prompt_with_one_picture_counts_nothing():
    features = torch.tensor([[0.0], [2.0], [100.0]])
    assert feature_diversity(features, ["a", "a", "b"]) == pytest.approx(2)
    assert feature_diversity(features, ["a", "b", "c"]) is None


def test_pixels_are_measured_as_root_mean_square():
    images = torch.zeros(2, 3, 8, 8)
    images[1] = 0.5
    assert pixel_diversity(images, ["a", "a"]) == pytest.approx(0.5)


def test_one_prompt_per_picture_is_needed():
    with pytest.raises(DiversityError, match="one prompt per picture"):
        feature_diversity(torch.zeros(3, 2), ["a"])
