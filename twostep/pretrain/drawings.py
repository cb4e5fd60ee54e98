"""The built-in emoji set: drawings of the same concepts in four styles, composited on plain
backgrounds.

They are rendered by `twostep drawings`, in the repository, from sets that NOTICE
names. `concepts.json` lists the concepts with their subgroup and their names, chosen from
emojibase's keywords.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from twostep.errors import TwostepError
from twostep.evaluate.attributes import BACKGROUNDS, Concept
from twostep.files import write_atomically

DRAWING_PIXELS = 128
PICTURE_PIXELS = 64


class EmojiError(TwostepError):
    """The emoji set could not be fetched, drawn or read."""


@dataclass(frozen=True)
class EmojiSet:
    """Drawings with transparent backgrounds: one per concept and style, in that order."""

    drawings: UInt8[Tensor, "concepts styles 4 height width"]
    concepts: tuple[Concept, ...]
    styles: tuple[str, ...]

    @property
    def subgroups(self) -> tuple[str, ...]:
        """The subgroups of the concepts, in order of first appearance."""
        return tuple(dict.fromkeys(concept.subgroup for concept in self.concepts))


def load_emoji(path: Path) -> EmojiSet:
    """Read what `twostep drawings` wrote; EmojiError where it is missing, damaged or
    another thing.
    """
    if not path.exists():
        raise EmojiError(
            f"There is no emoji set at {path}. Build it with: twostep drawings -o {path}"
        )
    try:
        with safe_open(path, "pt") as file:
            listing = json.loads((file.metadata() or {})["twostep.emoji"])
            drawings = file.get_tensor("drawings")
    except (SafetensorError, KeyError) as error:
        raise EmojiError(
            f"{path} is no emoji set ({error!r}); build it anew: twostep drawings"
        ) from error
    concepts = tuple(
        Concept(icon, subgroup, tuple(names)) for icon, subgroup, names in listing["concepts"]
    )
    return EmojiSet(drawings, concepts, tuple(listing["styles"]))


def save_emoji(emoji: EmojiSet, path: Path) -> None:
    """Write the set to one safetensors file."""
    listing = [[c.icon, c.subgroup, list(c.names)] for c in emoji.concepts]
    metadata = {"twostep.emoji": json.dumps({"concepts": listing, "styles": emoji.styles})}
    with write_atomically(path) as file:
        file.write(save({"drawings": emoji.drawings.contiguous()}, metadata))


def built_in_concepts() -> tuple[Concept, ...]:
    """Return the concepts that the shipped nano models know."""
    listing = json.loads((Path(__file__).parent / "concepts.json").read_text())
    return tuple(
        Concept(icon, entry["subgroup"], tuple(entry["names"])) for icon, entry in listing.items()
    )


@dataclass(frozen=True)
class Placement:
    """How far a drawing may stray from upright and centred when it is composited."""

    flip: bool = True
    smallest_scale: float = 0.8
    largest_scale: float = 0.94
    shift_pixels: float = 3.0
    rotation_degrees: float = 6.0


def compose(
    drawings: UInt8[Tensor, "batch 4 height width"],
    background: Int[Tensor, "batch"],
    placement: Placement,
    generator: torch.Generator,
) -> Float[Tensor, "batch 3 height width"]:
    """Put drawings on plain backgrounds, randomly flipped, scaled, shifted and turned; values in
    -1..1.

    `background` indexes BACKGROUNDS. Drawn at twice the size and averaged down, so edges stay
    clean.
    """
    return lay_on(place_drawings(drawings, placement, generator), background)


def lay_on(
    placed: Float[Tensor, "batch 4 height width"], background: Int[Tensor, "batch"]
) -> Float[Tensor, "batch 3 height width"]:
    """Put what `place_drawings` returned on plain backgrounds; `background` indexes BACKGROUNDS,
    values in -1..1.
    """
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32) / 255
    picture = placed[:, :3] + (1 - placed[:, 3:]) * colours[background][:, :, None, None]
    return picture * 2 - 1


def place_drawings(
    drawings: UInt8[Tensor, "batch 4 height width"],
    placement: Placement,
    generator: torch.Generator,
) -> Float[Tensor, "batch 4 height width"]:
    """Return drawings at random places, colours premultiplied with the opacity that follows them;
    values in 0..1.
    """
    count, canvas = len(drawings), 2 * PICTURE_PIXELS
    theta = _placements(count, placement, generator)
    grid = torch.nn.functional.affine_grid(theta, [count, 4, canvas, canvas], align_corners=False)
    rgba = drawings.float() / 255
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    placed = torch.nn.functional.grid_sample(premultiplied, grid, align_corners=False)
    return torch.nn.functional.avg_pool2d(placed, 2)


def _placements(
    count: int, placement: Placement, generator: torch.Generator
) -> Float[Tensor, "batch 2 3"]:
    flip, size, angle, shift_x, shift_y = torch.rand(5, count, generator=generator)
    mirror = torch.where(flip < 0.5, -1.0, 1.0) if placement.flip else torch.ones(count)
    scale = placement.smallest_scale + size * (placement.largest_scale - placement.smallest_scale)
    radians = (2 * angle - 1) * math.radians(placement.rotation_degrees)
    reach = 2 * placement.shift_pixels / PICTURE_PIXELS
    cosine, sine = torch.cos(radians) / scale, torch.sin(radians) / scale
    shift = torch.stack([(2 * shift_x - 1) * reach, (2 * shift_y - 1) * reach], dim=1)
    rotation = torch.stack(
        [torch.stack([mirror * cosine, -mirror * sine]), torch.stack([sine, cosine])]
    )
    rotation = rotation.permute(2, 0, 1)
    return torch.cat([rotation, -(rotation @ shift[:, :, None])], dim=2)
