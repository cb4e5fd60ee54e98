"""Folders of scenes are scored against the prompts written into them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from twostep.evaluate.attributes import STYLES
from twostep.evaluate.efficientnet import EfficientNet
from twostep.evaluate.kernel_distance import kernel_distance
from twostep.evaluate.scene_judge import SceneJudge
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.scene_prompt_sets import real_scenes, scene_tasks
from twostep.reports.evaluation import FolderError
from twostep.reports.scene_evaluation import evaluate_scene_folder, holds_scenes

from ..drawn import write_drawn


@pytest.fixture(scope="module")
def scene_judge(emoji: DrawingSet) -> SceneJudge:
    return SceneJudge(emoji.drawings, emoji.concepts, STYLES)


def test_real_pictures_are_right_and_others_are_not(
    emoji: DrawingSet, scene_judge: SceneJudge, tmp_path: Path
) -> None:
    tasks = scene_tasks(emoji.concepts, 6)
    pictures = real_scenes(tasks, emoji, pixels=256)
    prompts = [task.prompt for task in tasks]
    write_drawn(tmp_path / "right", pictures, prompts)
    write_drawn(tmp_path / "wrong", pictures, [*prompts[1:], prompts[0]])
    right = evaluate_scene_folder(tmp_path / "right", judge=scene_judge).report
    wrong = evaluate_scene_folder(tmp_path / "wrong", judge=scene_judge).report
    assert right.overall.num_right == right.overall.num_asked == right.num_images == 6
    assert right.single.num_asked + right.two.num_asked == 6
    assert wrong.overall.num_right == 0
    assert wrong.overall.num_asked == 6


def test_a_prompt_that_is_no_scene_is_named(
    emoji: DrawingSet, scene_judge: SceneJudge, tmp_path: Path
) -> None:
    write_drawn(tmp_path, torch.zeros(1, 3, 256, 256), ["a castle in the clouds"])
    answer = evaluate_scene_folder(tmp_path, judge=scene_judge)
    assert answer.unknown == (next(tmp_path.glob("*.png")),)
    assert answer.report.num_unknown == 1
    assert answer.report.overall.share is None


@pytest.mark.slow
def test_the_distance_to_a_reference_is_measured(
    emoji: DrawingSet, scene_judge: SceneJudge, tmp_path: Path
) -> None:
    tasks = scene_tasks(emoji.concepts, 8)
    pictures = real_scenes(tasks, emoji, pixels=256)
    prompts = [task.prompt for task in tasks]
    write_drawn(tmp_path / "real", pictures, prompts)
    write_drawn(tmp_path / "grey", pictures * 0.2, prompts)
    same, other = (
        evaluate_scene_folder(folder, reference=tmp_path / "real", judge=scene_judge).report
        for folder in (tmp_path / "real", tmp_path / "grey")
    )
    assert same.kernel_to_reference == pytest.approx(0, abs=1e-4)
    second = EfficientNet()
    features = [
        second.features(((each + 1) * 127.5).round() / 127.5 - 1)
        for each in (pictures * 0.2, pictures)
    ]
    # Files are read in the order of their names, which moves no sum but the last digits.
    expected = kernel_distance(*features, paired=True)
    assert expected > 0.01
    assert other.kernel_to_reference == pytest.approx(expected, rel=1e-3)


def test_the_size_of_the_pictures_says_whether_they_are_scenes(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    assert not holds_scenes(tmp_path)
    Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    assert holds_scenes(tmp_path)
    with pytest.raises(FolderError, match="no folder"):
        holds_scenes(tmp_path / "nothing")
