"""What of a drawing is plain text and numbers, which every way of asking for one has."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from twostep.media.codec import FULL


@dataclass(frozen=True)
class DrawingSettings:
    """What to draw, how many pictures of it, from which noise, and how.

    A command line's `Order`, a client's `Wish` and the `Request` that all of them become say the
    rest each in its own way: which model and LoRAs, and which pictures go in. Settings left at None
    take what the contract of the model recommends.

    Args:
        prompt: text.
        num_images: image i is drawn from seed + i.
        seed: of the first image.
        steps: picks the student that was trained for it, or the teacher by its own number.
        guidance: 1 is none; students have none.
        negative_prompt: text, which acts through guidance alone.
        width: in pixels.
        height: in pixels.
        strength: how much of a picture that goes in is changed, above 0 and up to 1 (0.75, with a
            mask 1).
        sampler: how a teacher goes from time to time: "euler", "dpmpp-2m" or "unipc"; "renoise" for
            models that add fresh noise. Students keep to their own.
        decoder: what makes pictures of latents: "full" is the model's autoencoder, "tiny" the
            smaller decoder that comes with it, and else the file, folder or hub id of one.
        frames: how long a clip is, of models that draw clips.
    """

    prompt: str
    num_images: int = field(default=1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)
    guidance: float | None = field(default=None, kw_only=True)
    negative_prompt: str = field(default="", kw_only=True)
    width: int | None = field(default=None, kw_only=True)
    height: int | None = field(default=None, kw_only=True)
    strength: float | None = field(default=None, kw_only=True)
    sampler: str | None = field(default=None, kw_only=True)
    decoder: str = field(default=FULL, kw_only=True)
    frames: int | None = field(default=None, kw_only=True)

    @property
    def settings(self) -> dict[str, Any]:
        """These fields alone, by name."""
        return {each.name: getattr(self, each.name) for each in fields(DrawingSettings)}
