"""What a run shows of itself: fixed prompts from fixed noise, by the teacher once, by students at
every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import pad

from twostep.diffusion import Denoise, sample
from twostep.distill.health import measure
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser

NUM_SEEDS = 2
"""Pictures of every prompt: the least that shows whether seeds differ."""

AT_ONCE = 4
"""Pictures drawn together, and decoded one by one, for training has left little memory."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The prompts of a run at the teacher's first size; the sheet shows the first seed, the
    measures use all.
    """

    teacher: Bundle
    conditioning: Conditioning
    empty: Conditioning

    @classmethod
    def of(cls, teacher: Bundle, prompts: tuple[str, ...]) -> Examples:
        """Encode the prompts, once and now: afterwards the text encoders may go."""
        size = teacher.contract.sizes[0]
        with torch.no_grad():
            told, empty = (
                teacher.conditioning(prompts * NUM_SEEDS, *size),
                teacher.conditioning([""], *size),
            )
        return cls(teacher, told, empty)

    def show(self, student: Denoiser, student_steps: int) -> tuple[Image.Image, dict[str, float]]:
        """Return teacher above student as a sheet, and how the student's looks compare
        (`health.measure`).
        """
        own = self.draw(student.with_conditioning, student_steps)
        labels = (f"teacher {self.teacher.contract.steps}", f"student {student_steps}")
        return _sheet(labels, torch.stack([self._of_teacher[0], own[0]])), measure(
            own, self._of_teacher
        )

    @cached_property
    def _of_teacher(self) -> Float[Tensor, "seeds prompts 3 height width"]:
        return self.draw(self.with_guidance, self.teacher.contract.steps)

    def with_guidance(self, asked: Conditioning) -> Denoise:
        """Return the teacher with its guidance, given what to draw."""
        return self.teacher.denoiser.with_guidance(
            asked, self.empty.expand(len(asked)), self.teacher.contract.guidance
        )

    @torch.no_grad()
    def draw(
        self, given: Callable[[Conditioning], Denoise], num_steps: int
    ) -> Float[Tensor, "seeds prompts 3 height width"]:
        """Draw every prompt from the same noise as ever, a few at a time, by a denoiser that is
        given what to draw.
        """
        shape = self.teacher.latent_shape(*self.teacher.contract.sizes[0])
        noise = torch.randn(
            len(self.conditioning), *shape, generator=torch.Generator().manual_seed(0)
        )
        schedule, pictures = self.teacher.denoiser.schedule, []
        for start in range(0, len(noise), AT_ONCE):
            asked = self.conditioning[start : start + AT_ONCE]
            latents = sample(
                given(asked),
                noise[start : start + AT_ONCE].to(asked.text.device),
                num_steps,
                schedule,
            )
            pictures += [self.teacher.codec.decode(latent).cpu() for latent in latents.split(1)]
        apart: Tensor = torch.cat(pictures).unflatten(0, (NUM_SEEDS, -1))
        return apart


def _sheet(
    labels: Sequence[str], rows: Float[Tensor, "rows columns 3 height width"]
) -> Image.Image:
    """Lay pictures out in rows, twice as large, with what they are on the left."""
    spaced = pad(rows, (0, 4, 0, 4), value=1.0)
    (grid,) = to_images(spaced.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None])
    font = ImageFont.load_default(size=15)
    left, width, height = (
        16 + round(max(map(font.getlength, labels))),
        2 * grid.width,
        2 * grid.height,
    )
    sheet = Image.new("RGB", (left + width, height), "white")
    sheet.paste(grid.resize((width, height), Image.Resampling.LANCZOS), (left, 0))
    for i, label in enumerate(labels):
        ImageDraw.Draw(sheet).text(
            (8, (i + 0.5) * height / len(labels)), label, "black", font, anchor="lm"
        )
    return sheet
