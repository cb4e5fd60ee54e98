"""The samples of a run: fixed prompts from fixed noise, by the teacher and every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from twostep.contract import SamplerName
from twostep.diffusion.shapes import Time
from twostep.distill.health import measure
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.sampling import (
    Guided,
    decode,
    encode_prompts,
    sample_latents,
    sampling_times,
)
from twostep.networks.denoiser import Denoiser

NUM_SEEDS = 2
"""Pictures of every prompt: the least that shows whether seeds differ."""

AT_ONCE = 4
"""Pictures drawn together; they are decoded one by one, for training has left little memory."""

_SCALE = 2
_FONT_SIZE = 15
_MARGIN = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """The sample prompts of a run, encoded at the teacher's first size.

    Args:
        teacher: which draws them once, with its guidance.
        guided: every prompt for each seed in turn, with the teacher's guidance.
    """

    teacher: Bundle
    guided: Guided

    @classmethod
    def of(cls, teacher: Bundle, prompts: tuple[str, ...]) -> Examples:
        """Encode the prompts now; the text encoders are not needed afterwards."""
        with torch.no_grad():
            guided = encode_prompts(teacher, prompts * NUM_SEEDS, teacher.contract.sizes[0])
        return cls(teacher, guided)

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
            A sheet with the first seed's pictures, the teacher's above the student's, and how the
            looks of all seeds compare (`health.measure`).
        """
        pictures = self.draw(student, self.unguided, times, sampler)
        num_steps = times if isinstance(times, int) else len(times) - 1
        labels = (f"teacher {self.teacher.contract.steps}", f"student {num_steps}")
        sheet = _sheet(labels, torch.stack([self._of_teacher[0], pictures[0]]))
        return sheet, measure(pictures, self._of_teacher)

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
        shape = self.teacher.latent_shape(*self.teacher.contract.sizes[0])
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(guided), *shape, generator=generator)
        pictures: list[Tensor] = []
        for start in range(0, len(noise), AT_ONCE):
            part = guided[start : start + AT_ONCE]
            seeds = range(start, start + len(part))
            x = noise[start : start + AT_ONCE].to(part.positive.text.device)
            latents = sample_latents(denoiser, part, x, times=times, seeds=seeds, sampler=sampler)
            pictures.append(self._pictures(latents).cpu())
        by_seed: Tensor = torch.cat(pictures).unflatten(0, (NUM_SEEDS, -1))
        return by_seed

    def _pictures(self, latents: Tensor) -> Float[Tensor, "items 3 height width"]:
        """Return pictures of latents: of media that are none, what the codec previews."""
        if self.teacher.codec.media == "image":
            return decode(self.teacher, latents, at_once=1)
        return self.teacher.codec.preview(latents)


def _sheet(
    labels: Sequence[str], rows: Float[Tensor, "rows columns 3 height width"]
) -> Image.Image:
    """Lay pictures out in rows, enlarged, with a label on the left of every row."""
    spaced = pad(rows, (0, 4, 0, 4), value=1.0)
    as_one = spaced.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    (grid,) = to_images(as_one[None])
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
