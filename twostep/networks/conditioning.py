"""What a denoiser is told beside the noisy latents: text, SDXL's micro-conditioning, known parts,
and ControlNets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.networks.control import Hint


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text embeddings, pooled embedding, SDXL's sizes in pixels: original (h, w), crop (top, left),
    target (h, w).

    `known`, for all items alike, is what an inpainting UNet takes too: the mask, 1 where it is to
    be drawn, and the latents of what is not masked. `hints` are the ControlNets that have a say,
    with a picture for every item.
    """

    text: Float[Tensor, "batch tokens width"]
    pooled: Float[Tensor, "batch pooled"]
    sizes: Float[Tensor, "batch 6"]
    known: Float[Tensor, "1 known h w"] | None = None
    hints: tuple[Hint, ...] = ()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Select items by a slice or an index tensor."""
        return self._changed(lambda values: values[index])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Put several batches one after the other."""
        text, pooled, sizes = zip(
            *((part.text, part.pooled, part.sizes) for part in parts), strict=True
        )
        shown = zip(*([hint.picture for hint in part.hints] for part in parts), strict=True)
        hints = tuple(
            replace(h, picture=torch.cat(p)) for h, p in zip(parts[0].hints, shown, strict=True)
        )
        return replace(
            parts[0],
            text=torch.cat(text),
            pooled=torch.cat(pooled),
            sizes=torch.cat(sizes),
            hints=hints,
        )

    def to(self, device: torch.device) -> Conditioning:
        """Return the same on a device."""
        return self._changed(lambda values: values.to(device))

    def expand(self, count: int) -> Conditioning:
        """Repeat a single item `count` times."""
        return self._changed(lambda values: values.expand(count, *values.shape[1:]))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        text, pooled, sizes = change(self.text), change(self.pooled), change(self.sizes)
        hints = tuple(replace(hint, picture=change(hint.picture)) for hint in self.hints)
        return replace(self, text=text, pooled=pooled, sizes=sizes, hints=hints)


def image_sizes(count: int, width: int, height: int) -> Float[Tensor, "count 6"]:
    """Return the micro-conditioning of uncropped pictures of this size."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(
        count, -1
    )
