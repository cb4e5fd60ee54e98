"""Training latents that the teacher draws itself, from a list of prompts.

Who distils somebody's model has seldom what it was trained on. What the teacher draws, with its
guidance, lies where its own flow leads, which is what the student is to follow (arXiv 2403.12706
makes its clips so). Any medium and any family can be drawn. Of a backbone with several frozen
networks each draws its share, so that every item belongs to the network that it trains.

Latents are drawn once, kept in the run's folder, and read from there afterwards; what was drawn
before an interruption is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twostep.data.sources import DataError
from twostep.data.texts import UnreadableTextError, read_lines
from twostep.diffusion.shapes import Batch
from twostep.files import write_atomically
from twostep.models.bundle import Bundle, PromptEncoder
from twostep.models.sampling import encode_prompts, sample_prompts
from twostep.networks.backbone import num_variants
from twostep.networks.conditioning import Conditioning
from twostep.training.processes import wait, world

FIRST_SEED = 900_000
"""Seeds of what is drawn begin here; those of samples and of evaluation are others."""

_FOLDER = "drawn"
_METADATA_KEY = "twostep.drawn"


@dataclass(frozen=True)
class DrawnItem:
    """What an item was drawn from: its prompt, its seed, and which frozen network drew it."""

    prompt: str
    seed: int
    variant: int = 0


@dataclass(frozen=True, eq=False)
class DrawnSource:
    """Latents that were drawn, with the conditioning of their prompts.

    Args:
        latents: in half precision [count, ...].
        items: what each was drawn from.
        text: encodes prompts.
        size: (width, height) in pixels.
        has_variants: whether the backbone has several frozen networks.
    """

    latents: Tensor
    items: tuple[DrawnItem, ...]
    text: PromptEncoder
    size: tuple[int, int]
    has_variants: bool = False

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Batch, Conditioning]:
        """Return random latents and the conditioning of their prompts."""
        rows = torch.randint(len(self.items), (count,), generator=tensors)
        chosen = [self.items[row] for row in rows.tolist()]
        conditioning = self.text.conditioning([item.prompt for item in chosen], *self.size)
        if self.has_variants:
            variants = tuple(item.variant for item in chosen)
            conditioning = replace(conditioning, variants=variants)
        return self.latents[rows].float(), conditioning

    def draw_latents(self, count: int, tensors: torch.Generator) -> Batch:
        """Return random latents alone."""
        rows = torch.randint(len(self.items), (count,), generator=tensors)
        return self.latents[rows].float()

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items, and the same networks."""
        return replace(self._empty.expand(len(like)), variants=like.variants)

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            return self.text.conditioning([""], *self.size)


def drawn_by_teacher(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    prompts: str,
    count: int = 512,
    steps: int = 32,
) -> DrawnSource:
    """Let the teacher draw what a student learns from: for `data` of a recipe.

    Args:
        teacher: draws as its contract says, where it is.
        out: the run's folder; latents are kept in its folder `drawn`.
        advance: called with what is drawn, of how many, and a word on it.
        prompts: a file with one prompt a line; they are taken in turns.
        count: how many items are drawn.
        steps: of the teacher.

    Raises:
        DataError: there are no prompts, or what lies in the folder was drawn from others.
    """
    variants = num_variants(teacher.denoiser.backbone)
    items = planned_items(read_prompts(Path(prompts)), count, variants)
    folder = out / _FOLDER
    if world().is_first:
        for number, item in enumerate(items):
            path = _path_of(folder, number)
            if not path.exists():
                _write(path, _drawn(teacher, item, steps), item)
            advance(number + 1, count, "drawn by the teacher")
    wait()
    latents = [_read(_path_of(folder, number), item) for number, item in enumerate(items)]
    return DrawnSource(
        torch.stack(latents),
        items,
        teacher.text,
        teacher.contract.sizes[0],
        has_variants=variants > 1,
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one a line; DataError where there are none."""
    try:
        lines = read_lines(path)
    except (OSError, UnreadableTextError) as error:
        raise DataError(f"the prompts in {path} cannot be read: {error}.") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DataError(f"{path} has no prompts; write one a line.")
    return prompts


def planned_items(prompts: Sequence[str], count: int, variants: int) -> tuple[DrawnItem, ...]:
    """Return what is drawn: prompts in turns, each turn from other noise by another network.

    Raises:
        DataError: nothing is to be drawn.
    """
    if count < 1:
        raise DataError(f"count is {count}; let the teacher draw at least one item.")
    items = []
    for number in range(count):
        turn, place = divmod(number, len(prompts))
        variant = (place + turn) % variants
        items.append(DrawnItem(prompts[place], FIRST_SEED + number, variant))
    return tuple(items)


def _drawn(teacher: Bundle, item: DrawnItem, steps: int) -> Tensor:
    """Return the latents of one item [1, ...]."""
    size = teacher.contract.sizes[0]
    with torch.no_grad():
        guided = encode_prompts(teacher, [item.prompt], size)
    variants = (item.variant,)
    negative = guided.negative
    if negative is not None:
        negative = replace(negative, variants=variants)
    guided = replace(
        guided, positive=replace(guided.positive, variants=variants), negative=negative
    )
    return sample_prompts(teacher, guided, [item.seed], size, steps=steps)


def _path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _write(path: Path, latents: Tensor, item: DrawnItem) -> None:
    metadata = {_METADATA_KEY: _described(item)}
    with write_atomically(path) as file:
        file.write(save({"latents": latents.half().cpu().contiguous()}, metadata))


def _read(path: Path, item: DrawnItem) -> Tensor:
    """Return the latents of one item without the batch; DataError if they are of another."""
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_METADATA_KEY)
            latents: Tensor = file.get_tensor("latents")[0]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it; it is drawn again.") from error
    if found != _described(item):
        raise DataError(
            f"{path} was drawn from {found}, and the recipe asks for {_described(item)}. Delete "
            f"the folder {path.parent}, or start under another --out."
        )
    return latents


def _described(item: DrawnItem) -> str:
    return json.dumps([item.prompt, item.seed, item.variant])
