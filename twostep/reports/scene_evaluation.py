"""The figures of a folder of scenes against the prompts written into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from twostep.evaluate.efficientnet import EfficientNet
from twostep.evaluate.kernel_distance import kernel_distance
from twostep.evaluate.measurements import SecondJudge
from twostep.evaluate.prompts import ScenePromptReader
from twostep.evaluate.scene_judge import SCENE_PIXELS, SceneJudge
from twostep.evaluate.scene_scores import (
    SceneReport,
    SceneVerdict,
    judge_scenes,
    summarise_scenes,
)
from twostep.pretrain.scene_judging import load_scene_judge
from twostep.reports.evaluation import load_pictures, pictures_in, prompt_of

_BATCH = 32

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


@dataclass(frozen=True)
class SceneFolderReport:
    """The figures of a folder, and the pictures in it that no prompt could be read of."""

    report: SceneReport
    unknown: tuple[Path, ...]


def holds_scenes(folder: Path) -> bool:
    """Tell whether the pictures of a folder are as large as those of scenes.

    Raises:
        FolderError: the folder holds no pictures.
    """
    try:
        with Image.open(pictures_in(folder)[0]) as first:
            return first.size == (SCENE_PIXELS, SCENE_PIXELS)
    except OSError:
        return False  # whoever reads it says what is wrong with it


def evaluate_scene_folder(
    folder: Path,
    *,
    reference: Path | None = None,
    judge: SceneJudge | None = None,
    advance: OnProgress = lambda done, total, words: None,
) -> SceneFolderReport:
    """Score the PNGs of a folder, as `twostep generate` wrote them, against their prompts.

    Pictures without a prompt, or with one that is no scene of mini's things, count in the distance
    only.

    Args:
        folder: of the PNGs.
        reference: a folder of PNGs to which the kernel distance is measured, in EfficientNet's
            features; in pairs, if it holds pictures of the same prompts in the order of the files'
            names.
        judge: looks at the pictures; by default that of mini's scenes.
        advance: called with what is done, of how many, and a word on it.

    Raises:
        FolderError: a folder holds no pictures, or one that is damaged or of another size.
        DrawingsError: the drawings that the judge knows cannot be rendered.
        SecondJudgeError: a reference is given and EfficientNet is not installed.
    """
    paths = pictures_in(folder)
    second = EfficientNet() if reference is not None else None
    if judge is None:
        judge = load_scene_judge(lambda done, total: advance(done, total, "drawings"))
    reader = ScenePromptReader(judge.concepts)
    prompts = [prompt_of(path) for path in paths]
    asked = [None if prompt is None else reader.read(prompt) for prompt in prompts]
    verdicts: list[SceneVerdict | None] = []
    for start in range(0, len(paths), _BATCH):
        part = slice(start, start + _BATCH)
        verdicts += judge_scenes(load_pictures(paths[part], judge.pixels), asked[part], judge)
        advance(len(verdicts), len(paths), "pictures")
    distance = None
    if reference is not None and second is not None:
        others = pictures_in(reference)
        is_paired = [prompt_of(path) for path in others] == prompts
        distance = kernel_distance(
            _features(paths, second), _features(others, second), paired=is_paired
        )
    stand_ins = [number if what is None else what for number, what in enumerate(asked)]
    report = summarise_scenes(verdicts, stand_ins, kernel_to_reference=distance)
    unknown = [path for path, what in zip(paths, asked, strict=True) if what is None]
    return SceneFolderReport(report, tuple(unknown))


def _features(paths: Sequence[Path], second: SecondJudge) -> Tensor:
    """Return the features of pictures, read in parts."""
    parts = [paths[start : start + _BATCH] for start in range(0, len(paths), _BATCH)]
    return torch.cat([second.features(load_pictures(part, SCENE_PIXELS)) for part in parts])
