"""Scenes: one or two things on a ground, as a table of numbers and as pictures.

A scene says which drawings lie where on a square canvas, and what is behind them. Scene number *i*
of a seed is the same everywhere, so scenes need not be stored. A `SceneTable` holds many of them as
a few small tensors, and `compose` turns rows of it into pictures with tensor operations alone, on
any device, without waiting for it: a training loop composes what it needs where it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int, Int16, UInt8
from torch import Tensor

from twostep.diffusion.shapes import sent
from twostep.errors import TwostepError
from twostep.evaluate.attributes import BACKGROUNDS, Box, Relation
from twostep.evaluate.resampling import triangle_weights

UNITS = 1024
"""What the side of the canvas measures in a table: boxes are whole numbers of these."""

NO_THING = -1
"""In a table, the number of the second thing of a scene that has only one."""

_LAYOUTS: tuple[Relation | None, ...] = (None, "left of", "above")
"""How the first thing of a scene lies to the second, by its number in a table; None if alone."""

_BLOCK = 4096
"""Scenes that share a random generator."""

_NUM_NUMBERS = 15
"""Random numbers that a scene takes."""

_SMALLEST_SIDE = 0.25
"""The smallest box that `compose` averages a drawing down to without aliasing."""


class SceneError(TwostepError):
    """A scene that cannot be laid out or composed."""


@dataclass(frozen=True)
class SceneLaw:
    """What random scenes look like: shares in 0..1, and sides as shares of the canvas's.

    Attributes:
        alone: share of scenes with one thing.
        beside: share of scenes with two things side by side; in the rest one is above the other.
        same_style: share of scenes with two things that are sure to have one style.
        plain: share of scenes on a ground of one colour; others are on a vertical gradient of two.
        alone_side: smallest and largest side of a thing that is alone.
        pair_side: the same of each of two.
        roaming: how far of the way to the edge of its place a thing may stray.
        stagger: how far two things stray at most across the direction in which they lie.
    """

    alone: float = 0.5
    beside: float = 0.3
    same_style: float = 0.6
    plain: float = 0.75
    alone_side: tuple[float, float] = (0.58, 0.92)
    pair_side: tuple[float, float] = (0.40, 0.49)
    roaming: float = 0.9
    stagger: float = 0.19


@dataclass(frozen=True)
class PlacedThing:
    """A drawing on the canvas: the numbers of its concept and its style, and where it lies."""

    concept: int
    style: int
    box: Box


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        things: one or two; of two, the left or the upper one is the first.
        relation: how the first lies to the second; None if there is one thing.
        background: numbers of BACKGROUNDS at the top and at the bottom, equal on a plain ground.
    """

    things: tuple[PlacedThing, ...]
    relation: Relation | None
    background: tuple[int, int]

    def __post_init__(self) -> None:
        """Refuse what is no scene; SceneError."""
        if len(self.things) not in (1, 2):
            raise SceneError(f"a scene has one thing or two, not {len(self.things)}.")
        if (len(self.things) == 2) != (self.relation is not None):
            raise SceneError(
                f"a scene of {len(self.things)} things cannot have the relation {self.relation!r}; "
                'two lie "left of" or "above" each other, and one has none.'
            )


@dataclass(frozen=True, eq=False)
class SceneTable:
    """Many scenes as whole numbers, a row each.

    Attributes:
        layout: 0 one thing, 1 two side by side, 2 one above the other.
        concepts: numbers of the concepts, the left or upper one first; NO_THING where there is no
            second thing.
        styles: numbers of the styles; 0 where there is no thing.
        boxes: left and top edge and side of every thing, in UNITS of the canvas's side.
        colours: numbers of BACKGROUNDS at the top and at the bottom.
    """

    layout: Int16[Tensor, " scenes"]
    concepts: Int16[Tensor, "scenes 2"]
    styles: Int16[Tensor, "scenes 2"]
    boxes: Int16[Tensor, "scenes 2 3"]
    colours: Int16[Tensor, "scenes 2"]

    def __len__(self) -> int:
        return len(self.layout)

    def rows(self, numbers: Int[Tensor, " chosen"] | slice) -> SceneTable:
        """Return some rows; numbers are on the table's device."""
        return SceneTable(*(column[numbers] for column in self._columns()))

    def to(self, device: torch.device | str) -> SceneTable:
        """Return the table on a device."""
        return SceneTable(*(column.to(device) for column in self._columns()))

    def scenes(self) -> list[Scene]:
        """Return the rows as scenes."""
        boxes = (self.boxes / UNITS).tolist()
        columns = (self.layout, self.concepts, self.styles, self.colours)
        rows = zip(*(column.tolist() for column in columns), boxes, strict=True)
        return [_scene(*row) for row in rows]

    def _columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def table_of(scenes: Sequence[Scene]) -> SceneTable:
    """Return the table of some scenes; boxes are rounded to whole UNITS."""
    table = _empty_table(len(scenes))
    for row, scene in enumerate(scenes):
        table.layout[row] = _LAYOUTS.index(scene.relation)
        table.colours[row] = torch.tensor(scene.background)
        for number, thing in enumerate(scene.things):
            table.concepts[row, number] = thing.concept
            table.styles[row, number] = thing.style
            box = torch.tensor([thing.box.left, thing.box.top, thing.box.side])
            table.boxes[row, number] = (box * UNITS).round().short()
    return table


def random_scenes(
    num_concepts: int,
    num_styles: int,
    *,
    count: int,
    seed: int,
    first: int = 0,
    law: SceneLaw | None = None,
) -> SceneTable:
    """Return the scenes number `first` to `first + count` of a seed.

    Any part of them is the same whatever is drawn before or beside it.

    Args:
        num_concepts: concepts to choose from.
        num_styles: styles to choose from.
        count: number of scenes.
        seed: 0 or more.
        first: number of the first one.
        law: what scenes look like; SceneLaw() if not given.
    """
    blocks = range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)
    numbers = [
        np.random.default_rng([seed, block]).random((_BLOCK, _NUM_NUMBERS)) for block in blocks
    ]
    start = first % _BLOCK
    drawn = torch.from_numpy(np.concatenate(numbers)[start : start + count])
    return _scenes_from(drawn, num_concepts, num_styles, law or SceneLaw())


def compose(
    table: SceneTable,
    drawings: UInt8[Tensor, "concepts styles 4 side side"],
    size: int,
) -> Float[Tensor, "scenes 3 size size"]:
    """Compose pictures in -1..1 of all scenes of a table.

    A drawing is scaled by weighing its rows, and then its columns, with triangles as wide as a
    pixel of the picture (or of the drawing, where that is wider), so edges are smooth at any size
    and place. Boxes are squares without rotation, so this is two products of matrices.

    Args:
        table: of the scenes, on the device of the drawings; for size 256 a hundred scenes need
            about 400 MB.
        drawings: RGBA in 0..255, as in `DrawingSet.drawings`.
        size: side of the pictures in pixels.
    """
    picture = _grounds(table.colours, size)
    for number in range(2):
        is_there = table.concepts[:, number] != NO_THING
        concept = table.concepts[:, number].clamp(min=0).long()
        chosen = drawings[concept, table.styles[:, number].long()].float() / 255
        alpha = chosen[:, 3:] * is_there[:, None, None, None]
        layer = torch.cat([chosen[:, :3] * alpha, alpha], dim=1)
        layer = _scaled(layer, table.boxes[:, number], size)
        picture = layer[:, :3] + (1 - layer[:, 3:]) * picture
    return picture * 2 - 1


def _grounds(colours: Int16[Tensor, "scenes 2"], size: int) -> Float[Tensor, "scenes 3 size size"]:
    """Return grounds in 0..1 that go from the upper colour in the first row to the lower one."""
    palette = sent(torch.tensor(list(BACKGROUNDS.values())) / 255, colours.device)
    top, bottom = palette[colours.long()].unbind(dim=1)
    down = torch.linspace(0, 1, size, device=colours.device)[:, None]
    ground = torch.lerp(top[:, :, None, None], bottom[:, :, None, None], down)
    return ground.expand(-1, -1, -1, size)


def _scaled(
    layers: Float[Tensor, "scenes 4 side side"], boxes: Int16[Tensor, "scenes 3"], size: int
) -> Float[Tensor, "scenes 4 size size"]:
    """Return layers scaled to their boxes on a transparent canvas."""
    left, top, side = (boxes.float() / UNITS).unbind(dim=1)
    # Where there is no thing the box is empty, and what is scaled is transparent at any size.
    side = side.clamp(min=1 / UNITS)
    rows = _weights(top, side, size, layers.shape[-1])
    columns = _weights(left, side, size, layers.shape[-1])
    return rows[:, None] @ layers @ columns[:, None].transpose(-1, -2)


def _weights(
    start: Float[Tensor, " scenes"], side: Float[Tensor, " scenes"], size: int, drawing_side: int
) -> Float[Tensor, "scenes size side"]:
    """Return how much each row of a drawing adds to each row of the canvas."""
    centres = (torch.arange(size, device=start.device) + 0.5) / size
    at = (centres - start[:, None]) / side[:, None] * drawing_side
    width = (drawing_side / size / side).clamp(min=1)
    margin = int(drawing_side / size / _SMALLEST_SIDE) + 1
    return triangle_weights(at, width, drawing_side, margin=margin)


def _scenes_from(
    numbers: Float[Tensor, "scenes numbers"], num_concepts: int, num_styles: int, law: SceneLaw
) -> SceneTable:
    """Return the scenes that random numbers in 0..1 mean."""
    columns = iter(numbers.unbind(dim=1))
    table = _empty_table(len(numbers))
    table.layout[:] = _layouts(next(columns), law)
    is_pair = table.layout > 0
    first = _choice(next(columns), num_concepts)
    # Counted on from the first concept, so that a scene does not have one thing twice.
    second = (first + 1 + _choice(next(columns), num_concepts - 1)) % num_concepts
    table.concepts[:, 0] = first
    table.concepts[:, 1] = torch.where(is_pair, second, NO_THING)
    table.styles[:, 0] = _choice(next(columns), num_styles)
    other_style = _choice(next(columns), num_styles)
    second_style = torch.where(next(columns) < law.same_style, table.styles[:, 0], other_style)
    table.styles[:, 1] = torch.where(is_pair, second_style, 0)
    table.colours[:, 0] = _choice(next(columns), len(BACKGROUNDS))
    distance = 1 + _choice(next(columns), len(BACKGROUNDS) - 1)
    other_colour = (table.colours[:, 0] + distance) % len(BACKGROUNDS)
    is_plain = next(columns) < law.plain
    table.colours[:, 1] = torch.where(is_plain, table.colours[:, 0], other_colour)
    for number in range(2):
        boxes = _boxes(number, table.layout, [next(columns) for _ in range(3)], law)
        table.boxes[:, number] = (boxes * UNITS).round().short()
    table.boxes[~is_pair, 1] = 0
    return table


def _layouts(numbers: Float[Tensor, " scenes"], law: SceneLaw) -> Int16[Tensor, " scenes"]:
    """Return the layouts that numbers in 0..1 mean."""
    shares = torch.tensor([law.alone, law.alone + law.beside], dtype=numbers.dtype)
    return torch.bucketize(numbers.contiguous(), shares, right=True).short()


def _choice(numbers: Float[Tensor, " scenes"], count: int) -> Int16[Tensor, " scenes"]:
    """Return whole numbers below `count`, each for an equal share of 0..1."""
    return (numbers * count).short()


def _boxes(
    number: int, layout: Int16[Tensor, " scenes"], drawn: Sequence[Tensor], law: SceneLaw
) -> Float[Tensor, "scenes 3"]:
    """Return the boxes of the first (0) or the second (1) thing of every scene."""
    size, along, across = drawn
    alone = _between(size, law.alone_side)
    pair = _between(size, law.pair_side)
    roam = (1 - alone) * law.roaming / 2
    alone_x = 0.5 + (2 * along - 1) * roam
    alone_y = 0.5 + (2 * across - 1) * roam
    # Each of two things has half of the canvas, and strays in it.
    in_half = 0.25 + number / 2 + (2 * along - 1) * (0.5 - pair) * law.roaming / 2
    staggered = 0.5 + (2 * across - 1) * law.stagger
    is_alone = layout == _LAYOUTS.index(None)
    is_beside = layout == _LAYOUTS.index("left of")
    x = torch.where(is_alone, alone_x, torch.where(is_beside, in_half, staggered))
    y = torch.where(is_alone, alone_y, torch.where(is_beside, staggered, in_half))
    side = torch.where(is_alone, alone, pair)
    return torch.stack([x - side / 2, y - side / 2, side], dim=1)


def _between(
    numbers: Float[Tensor, " scenes"], limits: tuple[float, float]
) -> Float[Tensor, " scenes"]:
    """Return numbers in 0..1 spread over the range between two limits."""
    low, high = limits
    return low + numbers * (high - low)


def _scene(
    layout: int,
    concepts: list[int],
    styles: list[int],
    colours: list[int],
    boxes: list[list[float]],
) -> Scene:
    """Return the scene of one row."""
    relation = _LAYOUTS[layout]
    things = [
        PlacedThing(concept, style, Box(*box))
        for concept, style, box in zip(concepts, styles, boxes, strict=True)
    ]
    top, bottom = colours
    return Scene(tuple(things if relation else things[:1]), relation, (top, bottom))


def _empty_table(count: int) -> SceneTable:
    """Return a table of scenes with nothing in them."""
    return SceneTable(
        torch.zeros(count, dtype=torch.int16),
        torch.full((count, 2), NO_THING, dtype=torch.int16),
        torch.zeros(count, 2, dtype=torch.int16),
        torch.zeros(count, 2, 3, dtype=torch.int16),
        torch.zeros(count, 2, dtype=torch.int16),
    )
