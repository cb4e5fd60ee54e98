"""What a denoiser is told beside the noisy latents: text, and SDXL's micro-conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Text embeddings, pooled embedding, SDXL's sizes in pixels: original (h, w), crop (top, left), target (h, w)."""

    text: Float[Tensor, "batch tokens width"]
    pooled: Float[Tensor, "batch pooled"]
    sizes: Float[Tensor, "batch 6"]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Select items by a slice or an index tensor."""
        return Conditioning(self.text[index], self.pooled[index], self.sizes[index])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Put several batches one after the other."""
        return Conditioning(
            torch.cat([part.text for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.sizes for part in parts]),
        )

    def to(self, device: torch.device) -> Conditioning:
        """Return the same on a device."""
        return Conditioning(self.text.to(device), self.pooled.to(device), self.sizes.to(device))

    def expand(self, count: int) -> Conditioning:
        """Repeat a single item `count` times."""
        return Conditioning(
            self.text.expand(count, -1, -1), self.pooled.expand(count, -1), self.sizes.expand(count, -1)
        )


def image_sizes(count: int, width: int, height: int) -> Float[Tensor, "count 6"]:
    """Return the micro-conditioning of uncropped pictures of this size."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)
