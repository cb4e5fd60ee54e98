"""What a denoiser is given beside the noisy latents: text, sizes, known parts and ControlNets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.diffusion.shapes import sent
from twostep.networks.control import Hint


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the items of a batch are to show.

    Args:
        text: Embeddings of the prompts.
        pooled: One embedding per prompt as a whole.
        sizes: SDXL's micro-conditioning in pixels (section 2.2 of arXiv 2307.01952): original
            (height, width), crop (top, left), target (height, width).
        known: What an inpainting network takes beside the latents, for all items alike: the mask,
            1 where it is to draw, and the latents of what is not masked.
        hints: ControlNets, each with a picture for every item.
        variants: Which of the backbone's frozen networks each item is for, where it has several;
            empty is the first for all.
    """

    text: Float[Tensor, "batch tokens width"]
    pooled: Float[Tensor, "batch pooled"]
    sizes: Float[Tensor, "batch 6"]
    known: Float[Tensor, "1 known h w"] | None = None
    hints: tuple[Hint, ...] = ()
    variants: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.text)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Select items by a slice or an index tensor."""
        if isinstance(index, slice):
            variants = self.variants[index]
        elif self.variants:
            variants = tuple(self.variants[place] for place in index.tolist())
        else:
            variants = ()
        selected = self._mapped(lambda values: values[index])
        return replace(selected, variants=variants)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches that share their ControlNets and known parts, one after the other."""
        hints = []
        for position, hint in enumerate(parts[0].hints):
            pictures = [part.hints[position].picture for part in parts]
            hints.append(replace(hint, picture=torch.cat(pictures)))
        return replace(
            parts[0],
            text=torch.cat([part.text for part in parts]),
            pooled=torch.cat([part.pooled for part in parts]),
            sizes=torch.cat([part.sizes for part in parts]),
            hints=tuple(hints),
            variants=_joined_variants(parts),
        )

    def to(self, device: torch.device) -> Conditioning:
        """Return the same on a device."""
        return self._mapped(lambda values: sent(values, device))

    def expand(self, count: int) -> Conditioning:
        """Repeat a single item `count` times."""
        repeated = self._mapped(lambda values: values.expand(count, *values.shape[1:]))
        return replace(repeated, variants=self.variants * count)

    def acting_at(self, time: float) -> Conditioning:
        """Return the same with only those ControlNets that act at this time."""
        if all(hint.acts_at(time) for hint in self.hints):
            return self
        return replace(self, hints=tuple(hint for hint in self.hints if hint.acts_at(time)))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply a change to every tensor that has one row per item."""
        hints = [replace(hint, picture=change(hint.picture)) for hint in self.hints]
        return replace(
            self,
            text=change(self.text),
            pooled=change(self.pooled),
            sizes=change(self.sizes),
            hints=tuple(hints),
        )


def image_sizes(count: int, width: int, height: int) -> Float[Tensor, "count 6"]:
    """Return the micro-conditioning of uncropped pictures of this size in pixels."""
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    return sizes.expand(count, -1)


def _joined_variants(parts: Sequence[Conditioning]) -> tuple[int, ...]:
    """Return the variants of all items; of a part that says none, the first for each."""
    if not any(part.variants for part in parts):
        return ()
    return tuple(v for part in parts for v in part.variants or (0,) * len(part))
