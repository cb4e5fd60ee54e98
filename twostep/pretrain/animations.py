"""Animated drawings from files, as clips with captions: Fluent's animated emoji, for example.

The packages `@lobehub/fluent-emoji-anim-1` to `-4` of npm (MIT) hold such as animated WebPs, named
by the code points of their emoji; half of them have a single frame and are left out. The same emoji
in another skin colour is the same drawing, so none is in one share of the data while the other is
in another. Only who fetches them needs npm, and a quarter of a gigabyte for each package.
"""

from __future__ import annotations

import re
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS
from twostep.models.bundle import Bundle
from twostep.networks.backbone import num_variants
from twostep.pretrain.captions import Omission
from twostep.pretrain.clips import ClipSource
from twostep.pretrain.drawings import DrawingsError, lay_on, random_backgrounds

STYLE = "3d"
"""How captions call the look of Fluent's animated emoji."""

_SKIN = re.compile(r"-?1f3f[b-f]")
_CODES = re.compile(r"[0-9a-f]{2,6}(-[0-9a-f]{2,6})*")
_PRESENTATION = "fe0f"
_HELD_OUT_PERCENT = 10


@dataclass(frozen=True, eq=False)
class Animation:
    """An animated drawing on a transparent background.

    Attributes:
        name: of its file, without the colour of skin; it decides which share of the data it is in.
        words: what captions call it.
        frames: RGBA, 0..255.
    """

    name: str
    words: str
    frames: UInt8[Tensor, "frames 4 height width"]

    @property
    def is_held_out(self) -> bool:
        """Whether it is in the tenth of all names that is not trained on."""
        return zlib.crc32(self.name.encode()) % 100 < _HELD_OUT_PERCENT


def read_animations(
    source: Path,
    *,
    num_frames: int,
    pixels: int,
    on_file: Callable[[int], None] = lambda num_done: None,
) -> list[Animation]:
    """Read the animated WebPs of an archive of npm, or of a folder.

    Args:
        source: a .tgz, or a folder that is looked through with all folders in it.
        num_frames: frames that are taken of each, evenly over its time.
        pixels: side that frames are scaled to.
        on_file: called with the number of files that are done.

    Returns:
        Those with more than one frame, by their names.

    Raises:
        DrawingsError: the source cannot be read, a file in it is damaged, or none is animated.
    """
    animations = []
    for number, (path, data) in enumerate(_files(source)):
        frames = _frames(path, data, num_frames, pixels)
        if frames is not None:
            name = _SKIN.sub("", path.stem.lower())
            animations.append(Animation(name, words_of(name), frames))
        on_file(number + 1)
    if not animations:
        raise DrawingsError(
            f"{source} holds no animated WebP: those of one frame are no clips. Give the archive "
            "of a package of animated drawings, or a folder of .webp files."
        )
    return sorted(animations, key=lambda animation: animation.name)


def words_of(name: str) -> str:
    """Return what a file shows by its name: what Unicode calls its first sign, or the name."""
    if _CODES.fullmatch(name):
        first = next(code for code in name.split("-") if code != _PRESENTATION)
        return unicodedata.name(chr(int(first, 16)), name).lower()
    return re.sub(r"[-_]+", " ", name)


@dataclass(frozen=True, eq=False)
class AnimatedDrawings:
    """Latents of animated drawings with captions, composed and encoded whenever they are drawn.

    Attributes:
        animations: what is shown; each begins at any of its frames, for they go round.
        bundle: whose codec encodes.
        omission: how often captions leave something out.
    """

    animations: tuple[Animation, ...]
    bundle: Bundle
    omission: Omission = field(default_factory=Omission)

    @torch.no_grad()
    def draw(
        self, count: int, tensors: torch.Generator, words: Random
    ) -> tuple[Float[Tensor, "count c frames h w"], list[str]]:
        """Return latents of random clips with captions, which often say less than there is."""
        rows = torch.randint(len(self.animations), (count,), generator=tensors)
        background = random_backgrounds(count, tensors)
        num_frames = self._frames.shape[1]
        starts = torch.randint(num_frames, (count,), generator=tensors)
        order = (starts[:, None] + torch.arange(num_frames)) % num_frames
        frames = self._frames[rows[:, None], order].flatten(0, 1).float() / 255
        premultiplied = torch.cat([frames[:, :3] * frames[:, 3:], frames[:, 3:]], dim=1)
        pictures = lay_on(premultiplied, background.repeat_interleave(num_frames))
        clips = pictures.unflatten(0, (count, num_frames)).transpose(1, 2)
        captions = []
        for row, number in zip(rows.tolist(), background.tolist(), strict=True):
            said = self.animations[row].words
            captions.append(
                self.omission.caption(
                    (said,), said, style=STYLE, background=list(BACKGROUNDS)[number], rng=words
                )
            )
        device = self.bundle.denoiser.device
        return self.bundle.codec.encode(clips.to(device)).float().cpu(), captions

    @cached_property
    def _frames(self) -> UInt8[Tensor, "animations frames 4 height width"]:
        return torch.stack([animation.frames for animation in self.animations])


def animated_drawings(
    teacher: Bundle,
    out: Path,
    advance: Callable[[int, int | None, str], None],
    *,
    source: str,
    share: Literal["trained", "held_out"] = "trained",
) -> ClipSource:
    """Return animated drawings as the teacher's latents, for `data` of a recipe.

    Args:
        teacher: a model of clips, whose codec and text encoders are used.
        out: the run's folder; nothing is kept there.
        advance: called with what is read.
        source: as in `read_animations`.
        share: of the names: nine tenths are trained on, one is held out.

    Raises:
        DrawingsError: there are no animations, or none in that share.
    """
    width, height = teacher.contract.sizes[0]
    _, num_frames, *_ = teacher.latent_shape(width, height)
    animations = read_animations(
        Path(source),
        num_frames=num_frames,
        pixels=width,
        on_file=lambda num_done: advance(num_done, None, "animations"),
    )
    chosen = tuple(each for each in animations if each.is_held_out == (share == "held_out"))
    if not chosen:
        raise DrawingsError(f"of {len(animations)} animations in {source} none is {share}.")
    clips = AnimatedDrawings(chosen, teacher)
    variants = num_variants(teacher.denoiser.backbone)
    return ClipSource(clips, teacher.text, width, height, num_variants=variants)


def _files(source: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the WebPs of an archive or a folder, in order of their names."""
    if source.is_dir():
        for path in sorted(source.rglob("*.webp")):
            yield path, path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None and member.name.endswith(".webp"):
                    yield Path(member.name), file.read()
    except (OSError, tarfile.TarError) as error:
        raise DrawingsError(
            f"{source} is neither an archive that can be read nor a folder ({error})."
        ) from error


def _frames(path: Path, data: bytes, num_frames: int, pixels: int) -> Tensor | None:
    """Return frames of an animation evenly over its time, None for a still picture."""
    try:
        with Image.open(BytesIO(data)) as image:
            count = getattr(image, "n_frames", 1)
            if count < 2:
                return None
            chosen = []
            for number in range(num_frames):
                image.seek(number * count // num_frames)
                scaled = image.convert("RGBA").resize((pixels, pixels), Image.Resampling.LANCZOS)
                chosen.append(torch.from_numpy(np.array(scaled)).permute(2, 0, 1))
    except (OSError, UnidentifiedImageError, EOFError) as error:
        raise DrawingsError(f"{path} is damaged ({error}); fetch its package again.") from error
    return torch.stack(chosen)
