"""The figures of a folder of pictures against the prompts written into them, by a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from twostep.errors import TwostepError
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.efficientnet import EfficientNet
from twostep.evaluate.judge import BUILT_IN, Judge, load_judge
from twostep.evaluate.measurements import Measurements, SecondJudge, measure
from twostep.evaluate.metrics import Report, evaluate
from twostep.evaluate.prompts import attributes_from_prompt
from twostep.media.image import from_levels
from twostep.media.pictures import UnusablePictureError, open_picture
from twostep.pipeline.provenance import ProvenanceError, read_provenance


class FolderError(TwostepError):
    """A folder that holds no pictures which can be scored."""


@dataclass(frozen=True)
class FolderReport:
    """The figures of a folder, and the pictures in it that no prompt could be read of."""

    report: Report
    unknown: tuple[Path, ...]


def evaluate_folder(
    folder: Path,
    *,
    reference: Path | None = None,
    judge: Path | None = None,
    with_second_judge: bool = False,
) -> FolderReport:
    """Score the PNGs of a folder, as `twostep generate` wrote them, against their prompts.

    Pictures without a prompt, or with one that names what the judge does not know, count in the
    distances only. Ratios and differences of histograms to the reference are taken if it holds
    pictures of the same prompts, in the order of the files' names.

    Args:
        folder: of the PNGs.
        reference: a folder of PNGs to which distances are measured.
        judge: a judge.safetensors; None for the built-in one.
        with_second_judge: whether to measure the distance in EfficientNet's features too.

    Raises:
        FolderError: a folder holds no pictures, or one that is damaged or of another size.
        JudgeError: the file is no judge.
        SecondJudgeError: the second judge is asked for and not installed.
    """
    referee = load_judge(judge or BUILT_IN)
    paths = pictures_in(folder)
    attributes = _attributes_of(paths, referee)
    second = EfficientNet() if with_second_judge else None
    compared = None
    if reference is not None:
        compared = _measure_folder(reference, referee, second)
    report = evaluate(
        load_pictures(paths, referee.pixels),
        attributes,
        referee,
        reference=compared,
        real=referee.real if len(paths) > 1 else None,
        second=second if reference is not None else None,
    )
    unknown = [path for path, known in zip(paths, attributes, strict=True) if known is None]
    return FolderReport(report, tuple(unknown))


def _attributes_of(paths: Sequence[Path], referee: Judge) -> list[Attributes | None]:
    """Return what each picture's prompt says; None without one, or one that is not understood."""
    prompts = [prompt_of(path) for path in paths]
    concepts = referee.classes.concepts
    return [
        None if prompt is None else attributes_from_prompt(prompt, concepts) for prompt in prompts
    ]


def _measure_folder(folder: Path, referee: Judge, second: SecondJudge | None) -> Measurements:
    """Measure the pictures of a folder."""
    paths = pictures_in(folder)
    pictures = load_pictures(paths, referee.pixels)
    return measure(pictures, _attributes_of(paths, referee), referee, second=second)


def pictures_in(folder: Path) -> list[Path]:
    """Return the PNGs of a folder, by name; FolderError if there are none."""
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder; give one that holds the PNGs to score.")
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FolderError(
            f"{folder} holds no PNG. Draw some with: twostep generate PROMPT --out {folder}"
        )
    return paths


def load_pictures(paths: Sequence[Path], pixels: int) -> Float[Tensor, "pictures 3 height width"]:
    """Read PNGs as pictures in -1..1; FolderError if one is damaged or of another size."""
    pictures = [_load_picture(path, pixels) for path in paths]
    return from_levels(torch.stack(pictures))


def _load_picture(path: Path, pixels: int) -> UInt8[Tensor, "3 height width"]:
    """Read a PNG; FolderError if it is damaged or of another size."""
    try:
        levels = np.array(open_picture(path.read_bytes))
    except UnusablePictureError as error:
        raise FolderError(f"{path}: {error}. Take it out of the folder.") from error
    height, width = levels.shape[:2]
    if (height, width) != (pixels, pixels):
        raise FolderError(f"{path} is {width}x{height}; the judge knows {pixels}x{pixels} only.")
    return torch.from_numpy(levels).permute(2, 0, 1)


def prompt_of(path: Path) -> str | None:
    """Return the prompt that is written in a picture; None if there is none."""
    try:
        return read_provenance(path).request.prompt
    except ProvenanceError:
        return None
