"""What a denoiser is told beside the noisy latents: text, SDXL's micro-conditioning, known parts, and ControlNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.models.control import Hint


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text embeddings, pooled embedding, SDXL's sizes in pixels: original (h, w), crop (top, left), target (h, w).

    `known` is for inpainting UNets alone: the mask, 1 where it is to be drawn, and the latents of what is not masked.
    `hints` are the ControlNets that have a say.
    """

    text: Float[Tensor, "batch tokens width"]
    pooled: Float[Tensor, "batch pooled"]
    sizes: Float[Tensor, "batch 6"]
    known: Float[Tensor, "batch known h w"] | None = None
    hints: tuple[Hint, ...] = ()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Select items by a slice or an index tensor."""
        return self._changed(lambda values: values[index])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Put several batches one after the other; all have the same ControlNets."""
        known = [part.known for part in parts if part.known is not None]
        pictures = zip(*([hint.picture for hint in part.hints] for part in parts), strict=True)
        return Conditioning(
            torch.cat([part.text for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.sizes for part in parts]),
            torch.cat(known) if known else None,
            tuple(replace(h, picture=torch.cat(several)) for h, several in zip(parts[0].hints, pictures, strict=True)),
        )

    def to(self, device: torch.device) -> Conditioning:
        """Return the same on a device."""
        return self._changed(lambda values: values.to(device))

    def expand(self, count: int) -> Conditioning:
        """Repeat a single item `count` times."""
        return self._changed(lambda values: values.expand(count, *values.shape[1:]))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        known = None if self.known is None else change(self.known)
        hints = tuple(replace(hint, picture=change(hint.picture)) for hint in self.hints)
        return Conditioning(change(self.text), change(self.pooled), change(self.sizes), known, hints)


def image_sizes(count: int, width: int, height: int) -> Float[Tensor, "count 6"]:
    """Return the micro-conditioning of uncropped pictures of this size."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)
