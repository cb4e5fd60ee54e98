"""The samples of a run: fixed prompts from fixed seeds, by the teacher and the student as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from twostep.contract import SamplerName
from twostep.diffusion.shapes import Time
from twostep.distill.health import measure
from twostep.files import write_atomically
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.sampling import (
    Guided,
    draw_noise,
    encode_prompts,
    pictures_of,
    sample_latents,
    sampling_times,
)
from twostep.networks.denoiser import Denoiser
from twostep.training.loop import Periodic
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder

if TYPE_CHECKING:
    from twostep.distill.recipe import TrainedStage

SEEDS = (0, 1)
"""Of the pictures of every prompt: two are the least that shows whether seeds differ."""

AT_ONCE = 4
"""Pictures drawn together; they are decoded one by one, for training has left little memory."""

_SCALE = 2
"""By how much small pictures are enlarged on a sheet."""

_LARGEST_ENLARGED = 256
"""Width in pixels above which pictures stay as they are."""

_FONT_SIZE = 15
_MARGIN = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """The sample prompts of a run, encoded at one size.

    Args:
        teacher: which draws them once, with its guidance.
        guided: every prompt for each seed in turn, with the teacher's guidance.
        size: (width, height) in pixels.
        seeds: of every prompt; a picture is the one that a request with this seed gives.
    """

    teacher: Bundle
    guided: Guided
    size: tuple[int, int]
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls,
        teacher: Bundle,
        prompts: tuple[str, ...],
        *,
        size: tuple[int, int] | None = None,
        seeds: tuple[int, ...] = SEEDS,
    ) -> Examples:
        """Encode the prompts now; the text encoders are not needed afterwards.

        Args:
            teacher: which draws them.
            prompts: what is drawn.
            size: (width, height) in pixels; the teacher's first if not given.
            seeds: of every prompt.
        """
        size = size or teacher.contract.sizes[0]
        with torch.no_grad():
            guided = encode_prompts(teacher, prompts * len(seeds), size)
        return cls(teacher, guided, size, seeds)

    @property
    def unguided(self) -> Guided:
        """The same prompts without guidance, as students draw them."""
        return Guided(self.guided.positive)

    def show(
        self, student: Denoiser, times: Sequence[Time] | int, sampler: SamplerName = "euler"
    ) -> tuple[Image.Image, dict[str, float]]:
        """Draw the prompts with a student.

        Args:
            student: that draws.
            times: that it visits, falling, the landing 0 included; or a number of steps.
            sampler: by which the student is sampled.

        Returns:
            A sheet with the pictures, of each seed the teacher's above the student's, and how their
            looks compare (`health.measure`).
        """
        pictures = self.draw(student, self.unguided, times, sampler)
        num_steps = times if isinstance(times, int) else len(times) - 1
        labels: list[str] = []
        rows: list[Tensor] = []
        for seed, by_teacher, by_student in zip(
            self.seeds, self._of_teacher, pictures, strict=True
        ):
            labels += [f"teacher {self.teacher.contract.steps}", f"student {num_steps}"]
            if len(self.seeds) > 1:
                labels[-2:] = [f"{label}, seed {seed}" for label in labels[-2:]]
            rows += [by_teacher, by_student]
        return sheet_of(labels, torch.stack(rows)), measure(pictures, self._of_teacher)

    @cached_property
    def _of_teacher(self) -> Float[Tensor, "seeds prompts 3 height width"]:
        teacher = self.teacher
        times = sampling_times(teacher.contract, teacher.denoiser.schedule)
        return self.draw(teacher.denoiser, self.guided, times, teacher.contract.sampler)

    @torch.no_grad()
    def draw(
        self,
        denoiser: Denoiser,
        guided: Guided,
        times: Sequence[Time] | int,
        sampler: SamplerName = "euler",
    ) -> Float[Tensor, "seeds prompts 3 height width"]:
        """Draw every prompt, from the same noise in every call.

        Args:
            denoiser: which draws.
            guided: the prompts, `self.guided` or `self.unguided`.
            times: that are visited, falling, the landing 0 included; or a number of steps.
            sampler: its name.
        """
        shape = self.teacher.latent_shape(*self.size)
        num_prompts = len(guided) // len(self.seeds)
        all_seeds = [seed for seed in self.seeds for _ in range(num_prompts)]
        pictures: list[Tensor] = []
        for start in range(0, len(guided), AT_ONCE):
            part = guided[start : start + AT_ONCE]
            seeds = all_seeds[start : start + AT_ONCE]
            x = draw_noise(seeds, shape, part.positive.text.device)
            latents = sample_latents(denoiser, part, x, times=times, seeds=seeds, sampler=sampler)
            pictures.append(pictures_of(self.teacher, latents, at_once=1).cpu())
        by_seed: Tensor = torch.cat(pictures).unflatten(0, (len(self.seeds), -1))
        return by_seed


ExamplesT = TypeVar("ExamplesT")


class SampleSheets(Generic[ExamplesT]):
    """The sheets of one stage: drawn every so often, and at every checkpoint."""

    def __init__(
        self,
        examples: Sequence[ExamplesT],
        draw: Callable[[ExamplesT], tuple[Image.Image, dict[str, float]]],
        write: Callable[[int, Image.Image], None],
    ) -> None:
        """Have drawn nothing yet.

        Args:
            examples: of every size; the looks are those of the first.
            draw: with the student as it is; returns a sheet and how it looks.
            write: called with the number of iterations done and the sheet of all sizes.
        """
        self._examples = examples
        self._draw = draw
        self._write = write
        self._drawn: tuple[int, dict[str, float]] | None = None

    def show(self, iteration: int) -> None:
        """Draw and write the sheet of an iteration."""
        sheets, looks = zip(*map(self._draw, self._examples), strict=True)
        self._write(iteration, _stacked(sheets))
        self._drawn = (iteration, looks[0])

    def examine(self, iteration: int) -> dict[str, float]:
        """Return how the student looks; the sheet is drawn unless that was done just before."""
        drawn = self._drawn
        if drawn is None or drawn[0] != iteration:
            self.show(iteration)
            drawn = self._drawn
        assert drawn is not None
        # After a rollback the same iteration comes again with another student.
        self._drawn = None
        return drawn[1]


def sheets_in(
    folder: RunFolder,
    stage: TrainedStage,
    examples: Sequence[ExamplesT],
    draw: Callable[[ExamplesT], tuple[Image.Image, dict[str, float]]],
) -> tuple[SampleSheets[ExamplesT], Periodic]:
    """Return the sheets of a stage in a run's folder, and when they are drawn beside checkpoints.

    Args:
        folder: of the run; sheets lie in its folder `samples`.
        stage: whose sheets they are.
        examples: of every size.
        draw: with the student as it is; returns a sheet and how it looks.
    """

    def sheet_path(iteration: int) -> Path:
        return folder.path / "samples" / f"{stage.name}-{iteration:06d}.png"

    def write_sheet(iteration: int, sheet: Image.Image) -> None:
        if world().is_first:
            path = sheet_path(iteration)
            with write_atomically(path) as file:
                sheet.save(file, format="PNG")
            folder.log(part=stage.name, iteration=iteration, picture=f"samples/{path.name}")

    def has_sheet(iteration: int) -> bool:
        path = sheet_path(iteration)
        return path.exists() and folder.has_logged(part=stage.name, picture=f"samples/{path.name}")

    sheets = SampleSheets(examples, draw=draw, write=write_sheet)
    samples = Periodic(
        "samples",
        stage.sample_every,
        act=sheets.show,
        is_done=has_sheet,
        at_start=True,
    )
    return sheets, samples


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Lay sheets of several sizes below each other."""
    if len(sheets) == 1:
        return sheets[0]
    width = max(sheet.width for sheet in sheets)
    stacked = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, top))
        top += sheet.height
    return stacked


def sheet_of(
    labels: Sequence[str], rows: Float[Tensor, "rows columns 3 height width"]
) -> Image.Image:
    """Lay pictures out in rows with a label on the left of every row; small ones are enlarged."""
    spaced = pad(rows, (0, 4, 0, 4), value=1.0)
    as_one = spaced.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    (grid,) = to_images(as_one[None])
    if rows.shape[-1] <= _LARGEST_ENLARGED:
        grid = grid.resize((_SCALE * grid.width, _SCALE * grid.height), Image.Resampling.LANCZOS)
    font = ImageFont.load_default(size=_FONT_SIZE)
    left = 2 * _MARGIN + round(max(map(font.getlength, labels)))
    sheet = Image.new("RGB", (left + grid.width, grid.height), "white")
    sheet.paste(grid, (left, 0))
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        middle = (i + 0.5) * grid.height / len(labels)
        draw.text((_MARGIN, middle), label, "black", font, anchor="lm")
    return sheet
