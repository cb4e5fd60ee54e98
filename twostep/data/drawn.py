"""Training latents that the teacher draws itself, from a list of prompts.

Who distils somebody's model has seldom what it was trained on. What the teacher draws, with its
guidance, lies where its own flow leads, which is what the student is to follow (arXiv 2403.12706
makes its clips so). Any medium and any family can be drawn. Of a backbone with several frozen
networks each draws its share, so that every item belongs to the network that it trains.

Latents are drawn once, kept in the run's folder, and read from there afterwards; what was drawn
before an interruption is kept.

A whole *walk*, a sampling trajectory, holds the latents at every point of the way too, from pure
noise on. A student can learn its steps from these alone (`walks` of a method's landings): they
start where it will start when it draws, the teacher need not be asked again, and may be as slow as
it likes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twostep.data.sources import DataError
from twostep.data.texts import UnreadableTextError, read_lines
from twostep.data.walks import Walks
from twostep.diffusion import find_sampler
from twostep.diffusion.flow import Keep
from twostep.diffusion.shapes import Batch, Time
from twostep.files import write_atomically
from twostep.models.bundle import Bundle, PromptEncoder
from twostep.models.sampling import draw_noise, encode_prompts, sample_prompts, sampling_times
from twostep.networks.backbone import num_variants
from twostep.networks.conditioning import Conditioning
from twostep.training.processes import wait, world

FIRST_SEED = 900_000
"""Seeds of what is drawn begin here; those of samples and of evaluation are others."""

_FOLDER = "drawn"
_WALKED = "walked"
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
        return self.latents[rows].float(), self._conditioning(rows)

    def draw_latents(self, count: int, tensors: torch.Generator) -> Batch:
        """Return random latents alone."""
        rows = torch.randint(len(self.items), (count,), generator=tensors)
        return self.latents[rows].float()

    def empty(self, like: Conditioning) -> Conditioning:
        """Return the conditioning of the empty prompt for as many items, and the same networks."""
        return replace(self._empty.expand(len(like)), variants=like.variants)

    def _conditioning(self, rows: Tensor) -> Conditioning:
        chosen = [self.items[row] for row in rows.tolist()]
        conditioning = self.text.conditioning([item.prompt for item in chosen], *self.size)
        if not self.has_variants:
            return conditioning
        return replace(conditioning, variants=tuple(item.variant for item in chosen))

    @cached_property
    def _empty(self) -> Conditioning:
        with torch.no_grad():
            return self.text.conditioning([""], *self.size)


@dataclass(frozen=True, eq=False, kw_only=True)
class WalkedSource(DrawnSource):
    """Whole walks of the teacher; as examples they are where these end.

    Args:
        walks: the latents at every point, in half precision [count, points, ...].
        times: of the points, falling, the landing 0 included.
    """

    walks: Tensor
    times: tuple[Time, ...]

    @torch.no_grad()
    def draw_walks(self, count: int, tensors: torch.Generator, words: Random) -> Walks:
        """Return random walks and the conditioning of their prompts."""
        rows = torch.randint(len(self.items), (count,), generator=tensors)
        return Walks(self.walks[rows], self.times, self._conditioning(rows))

    def fingerprint(self) -> str:
        """Return a text that tells these walks from others."""
        return hashlib.sha256(self.walks.numpy().tobytes()).hexdigest()


def drawn_by_teacher(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    prompts: str,
    count: int = 512,
    steps: int = 32,
    batch_size: int = 1,
) -> DrawnSource:
    """Let the teacher draw what a student learns from: for `data` of a recipe.

    Args:
        teacher: draws as its contract says, where it is.
        out: the run's folder; latents are kept in its folder `drawn`.
        advance: called with what is drawn, of how many, and a word on it.
        prompts: a file with one prompt a line; they are taken in turns.
        count: how many items are drawn.
        steps: of the teacher.
        batch_size: how many are drawn at once: more are faster where there is memory for them.

    Raises:
        DataError: there are no prompts, or what lies in the folder was drawn from others.
    """
    items = _items(teacher, prompts, count)
    return latents_of(teacher, items, out, advance, steps=steps, batch_size=batch_size)


def walked_by_teacher(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    prompts: str,
    count: int = 512,
    steps: int = 32,
    sampler: str = "",
    batch_size: int = 1,
) -> WalkedSource:
    """Let the teacher walk from noise to what it draws: for `data` of a recipe with `walks`.

    Args:
        teacher: draws as its contract says, guidance included, where it is.
        out: the run's folder; walks are kept in its folder `walked`.
        advance: called with what is drawn, of how many, and a word on it.
        prompts: a file with one prompt a line; they are taken in turns.
        count: how many walks there are. Each holds a step of every student from each of its times;
            of a few alone a student would learn nothing but them by heart.
        steps: of the teacher, a multiple of every student's and of 4; `teacher_steps` in stages.
        sampler: that the teacher walks by, `dpmpp-2m` or `unipc` for fewer steps; its own if empty.
        batch_size: how many are drawn at once: more are faster where there is memory for them.

    Raises:
        DataError: there are no prompts, or what lies in the folder was drawn from others.
        SamplerError: the sampler's name is not known.
    """
    items = _items(teacher, prompts, count)
    return walks_of(
        teacher, items, out, advance, steps=steps, sampler=sampler, batch_size=batch_size
    )


def latents_of(
    teacher: Bundle,
    items: tuple[DrawnItem, ...],
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    steps: int,
    batch_size: int = 1,
) -> DrawnSource:
    """Return what the teacher draws of these items; arguments as of `drawn_by_teacher`."""

    def draw(chosen: Sequence[DrawnItem]) -> Tensor:
        # Files have a dimension for one item.
        return _drawn(teacher, chosen, steps).unsqueeze(1)

    latents = _kept(out / _FOLDER, items, advance, draw=draw, batch_size=batch_size, made_by=[])
    return DrawnSource(
        latents[:, 0],
        items,
        teacher.text,
        teacher.contract.sizes[0],
        has_variants=num_variants(teacher.denoiser.backbone) > 1,
    )


def walks_of(
    teacher: Bundle,
    items: tuple[DrawnItem, ...],
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    steps: int,
    sampler: str,
    batch_size: int = 1,
) -> WalkedSource:
    """Return the teacher's walks to these items; arguments as of `walked_by_teacher`."""

    def draw(chosen: Sequence[DrawnItem]) -> Tensor:
        size = teacher.contract.sizes[0]
        points = [draw_noise([item.seed for item in chosen], teacher.latent_shape(*size))]

        def keep(x: Tensor, s: Tensor) -> Tensor:
            points.append(x.cpu())
            return x

        _drawn(teacher, chosen, steps, sampler=sampler or None, keep=keep)
        return torch.stack(points, dim=1)

    if sampler:
        find_sampler(sampler)
    walks = _kept(
        out / _WALKED,
        items,
        advance,
        draw=draw,
        batch_size=batch_size,
        made_by=[steps, sampler],
    )
    return WalkedSource(
        latents=walks[:, -1],
        items=items,
        text=teacher.text,
        size=teacher.contract.sizes[0],
        has_variants=num_variants(teacher.denoiser.backbone) > 1,
        walks=walks,
        times=sampling_times(teacher.contract, teacher.denoiser.schedule, steps=steps),
    )


def _items(teacher: Bundle, prompts: str, count: int) -> tuple[DrawnItem, ...]:
    """Return what is drawn of a file of prompts, shared out to the teacher's frozen networks."""
    variants = num_variants(teacher.denoiser.backbone)
    return planned_items(read_prompts(Path(prompts)), count, variants)


def _kept(
    folder: Path,
    items: Sequence[DrawnItem],
    advance: Callable[[int, int | None, str], None],
    *,
    draw: Callable[[Sequence[DrawnItem]], Tensor],
    batch_size: int,
    made_by: list[int | str],
) -> Tensor:
    """Return what is drawn of every item, from the folder where it was drawn before.

    Args:
        folder: takes a file of every item.
        items: what is drawn.
        advance: called with what is drawn, of how many, and a word on it.
        draw: draws some of them at once, the items first in what it returns.
        batch_size: how many at once; 1 or more.
        made_by: what it depends on beside the item.

    Raises:
        DataError: the batch size is not positive, or a file in the folder is damaged or of another
            item.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; let the teacher draw at least one at once.")
    files = [
        (_path_of(folder, number), _described(item, made_by)) for number, item in enumerate(items)
    ]
    missing = []
    for number, (path, described) in enumerate(files):
        if not path.exists():
            missing.append(number)
            continue
        # Told before hours of drawing beside what could not be used.
        with _opened(path, described):
            pass
    if world().is_first:
        num_done = len(items) - len(missing)
        for start in range(0, len(missing), batch_size):
            advance(num_done + start, len(items), "drawn by the teacher")
            numbers = missing[start : start + batch_size]
            drawn = draw([items[number] for number in numbers])
            for number, latents in zip(numbers, drawn, strict=True):
                path, described = files[number]
                _write(path, latents, described)
        advance(len(items), len(items), "drawn by the teacher")
    wait()
    return torch.stack([_read(path, described) for path, described in files])


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


def _drawn(
    teacher: Bundle,
    items: Sequence[DrawnItem],
    steps: int,
    *,
    sampler: str | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Return the latents of some items [items, ...]."""
    size = teacher.contract.sizes[0]
    with torch.no_grad():
        guided = encode_prompts(teacher, [item.prompt for item in items], size)
    variants = tuple(item.variant for item in items)
    negative = guided.matched_negative
    if negative is not None:
        negative = replace(negative, variants=variants)
    guided = replace(
        guided, positive=replace(guided.positive, variants=variants), negative=negative
    )
    seeds = [item.seed for item in items]
    return sample_prompts(teacher, guided, seeds, size, steps=steps, sampler=sampler, keep=keep)


def _path_of(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def _write(path: Path, latents: Tensor, described: str) -> None:
    with write_atomically(path) as file:
        file.write(save({"latents": latents.half().cpu().contiguous()}, {_METADATA_KEY: described}))


@contextmanager
def _opened(path: Path, described: str) -> Iterator[Any]:
    """Open the file of an item; DataError if it is damaged or of another."""
    try:
        with safe_open(path, "pt") as file:
            found = (file.metadata() or {}).get(_METADATA_KEY)
            if found != described:
                raise DataError(
                    f"{path} was drawn from {found}, and the recipe asks for {described}. Delete "
                    f"the folder {path.parent}, or start under another --out."
                )
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}). Delete it; it is drawn again.") from error


def _read(path: Path, described: str) -> Tensor:
    """Return the latents of one item; raises as `_opened`."""
    with _opened(path, described) as file:
        latents: Tensor = file.get_tensor("latents")
    return latents


def _described(item: DrawnItem, made_by: Sequence[int | str] = ()) -> str:
    return json.dumps([item.prompt, item.seed, item.variant, *made_by])
