"""The command that scores a folder of nano's pictures against the prompts written into them."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from examples.nano.drawings import PICTURE_PIXELS
from examples.nano.judge import BUILT_IN, load_judge
from examples.nano.prompts import attributes_from_prompt
from examples.nano.report import Report, Score
from examples.nano.report import evaluate as evaluate_pictures
from twostep.errors import TwostepError
from twostep.files import write_atomically
from twostep.pipeline.png import ProvenanceError, read_provenance

_NUM_NAMED = 5


class FolderError(TwostepError):
    """A folder that holds no pictures which can be scored."""


def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Folder of PNGs as `twostep generate` wrote them.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Folder of PNGs to measure the distance to.")
    ] = None,
    judge: Annotated[
        Path | None, typer.Option(help="A judge.safetensors; the built-in one by default.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Score pictures against their prompts: concept, style, background, distance to real ones,
    diversity.
    """
    referee = load_judge(judge or BUILT_IN)
    paths = _pictures_in(folder)
    prompts = [_prompt_of(path) for path in paths]
    concepts = referee.classes.concepts
    attributes = [
        None if prompt is None else attributes_from_prompt(prompt, concepts) for prompt in prompts
    ]
    report = evaluate_pictures(
        _load_pictures(paths),
        attributes,
        referee,
        reference=referee.statistics(_load_pictures(_pictures_in(reference)))
        if reference
        else None,
        real=referee.real if len(paths) > 1 else None,
    )
    if json_path is not None:
        with write_atomically(json_path) as file:
            file.write(json.dumps(report.to_dict(), indent=2).encode())
    _warn_of_unknown([path for path, wish in zip(paths, attributes, strict=True) if wish is None])
    Console().print(_table(report, reference))


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder; give one that holds the PNGs to score.")
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FolderError(
            f"{folder} holds no PNG. Draw some with: twostep generate PROMPT --out {folder}"
        )
    return paths


def _load_pictures(paths: list[Path]) -> Tensor:
    """Read PNGs as pictures in -1..1; FolderError names the file that is damaged or of another
    size.
    """
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise FolderError(
                f"{path} cannot be read as a picture ({error}). Take it out of the folder."
            ) from error
        if pixels.shape[:2] != (PICTURE_PIXELS, PICTURE_PIXELS):
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise FolderError(
                f"{path} is {size}; the judge knows {PICTURE_PIXELS}x{PICTURE_PIXELS} only."
            )
        pictures.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(pictures).float() / 127.5 - 1


def _prompt_of(path: Path) -> str | None:
    try:
        return read_provenance(path).request.prompt
    except ProvenanceError:
        return None


def _warn_of_unknown(paths: list[Path]) -> None:
    if paths:
        names = ", ".join(path.name for path in paths[:_NUM_NAMED]) + (
            ", ..." if len(paths) > _NUM_NAMED else ""
        )
        text = (
            f"warning: {len(paths)} picture(s) are not scored against a prompt, for they have none, or one that names "
            f"something the judge does not know: {names}. They count in the distances only."
        )
        Console(stderr=True).print(Text(text, style="yellow"), soft_wrap=True)


def _table(report: Report, reference: Path | None) -> Table:
    table = Table()
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("pictures", str(report.num_images))
    table.add_row("concept right", _share(report.concept))
    table.add_row("subgroup right", _share(report.subgroup))
    table.add_row("style right", _share(report.style))
    table.add_row("background right", _share(report.background))
    table.add_row("Frechet distance to real pictures", _number(report.frechet_to_real))
    if reference is not None:
        table.add_row(f"Frechet distance to {reference}", _number(report.frechet_to_reference))
    table.add_row("diversity between seeds, features", _number(report.feature_diversity))
    table.add_row("diversity between seeds, pixels", _number(report.pixel_diversity))
    table.add_row("blur, pixels", _number(report.mean_blur_pixels))
    return table


def _share(score: Score) -> str:
    if score.share is None:
        return "not asked"
    return f"{100 * score.share:.1f} % of {score.num_asked}"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
