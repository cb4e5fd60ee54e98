"""The scene judge: which known drawings are on a picture, where, and on what ground.

Nothing in it is trained. What is left of a picture when its ground is taken away is explained by
known drawings: a drawing at a place changes the ground to a picture that can be computed, and the
share of the picture's energy that is gone when this is subtracted, the drawing's *likeness*, says
how well it fits (masked correlation; the best of all drawings, places and sizes is matching pursuit
with a dictionary of drawings). The search goes from coarse to fine: all drawings at all places and
sizes at 12 pixels a drawing, the best at 32 and then at 64, where place and size are refined by
Gauss-Newton steps.

A picture shows one thing, two side by side, or one above the other, whichever explains it best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from twostep.evaluate.attributes import Box, Concept, Relation
from twostep.evaluate.grounds import Grounds, fit_grounds
from twostep.evaluate.judge import check_pictures
from twostep.evaluate.resampling import triangle_weights

SCENE_PIXELS = 256
"""Side of the pictures of mini's scenes."""

COARSE = 12
"""Side of a drawing in the search of all of them."""

MIDDLE = 32
FINE = 64
"""Sides of drawings where the best few are compared."""

IS_THERE = 0.5
"""A drawing with less likeness than this is not there: the picture shows something else."""

ALIKE = 0.01
"""Drawings whose pictures differ by less than this share of their energy cannot be told apart."""

_NUM_COARSE = 32
_NUM_MIDDLE = 16
_NUM_FINE = 5
"""Drawings of each part of a picture that a search finds, and that are looked at more closely."""

_SIDES_ALONE = (0.54, 0.59, 0.645, 0.705, 0.77, 0.84, 0.915, 1.0)
_SIDES_OF_PAIR = (0.375, 0.41, 0.45, 0.49, 0.535)
"""Sides of boxes that are tried, each about 9 % larger than the one before."""

_OVERHANG = 0.04
"""How far a box may reach beyond the edge of its part of the picture, as a share of its side."""

_HELD = 0.85
"""A box is tried if it holds this share of the energy of its part of the picture."""

_CLOSE = 0.25
_VERY_CLOSE = 0.05
"""A layout that explains less than the best one by more than this is not looked at more closely:
after the search, and after the first refinement."""

_CHUNK = 256
"""Drawings that are made smaller at once."""

_STRAYING = 0.06
"""How far a box may reach beyond its part of the picture. One that reaches further explains what
belongs to the other part, and would be counted twice."""


@dataclass(frozen=True)
class SeenThing:
    """A drawing found on a picture.

    Attributes:
        concept: number of the concept.
        style: number of the style.
        box: where it is.
        likeness: share of the energy of its part of the picture that it explains, up to 1.
        alike: numbers of concept and style of every drawing that would look the same there, this
            one included.
    """

    concept: int
    style: int
    box: Box
    likeness: float
    alike: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Sight:
    """What a picture shows.

    Attributes:
        things: the drawings that are there; of two, the left or the upper one is the first.
        relation: how the first lies to the second; None without a second.
        background: names of the colours at the top and at the bottom; None for one that is no
            known colour.
    """

    things: tuple[SeenThing, ...]
    relation: Relation | None
    background: tuple[str | None, str | None]


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of the picture in which one thing is looked for: its limits, and sides of boxes."""

    left: tuple[float, float]
    top: tuple[float, float]
    sides: tuple[float, ...]


_WHOLE = (0.0, 1.0)
_FIRST = (0.0, 0.5)
_SECOND = (0.5, 1.0)

_LAYOUTS: dict[Relation | None, tuple[_Part, ...]] = {
    None: (_Part(_WHOLE, _WHOLE, _SIDES_ALONE),),
    "left of": (
        _Part(_FIRST, _WHOLE, _SIDES_OF_PAIR),
        _Part(_SECOND, _WHOLE, _SIDES_OF_PAIR),
    ),
    "above": (
        _Part(_WHOLE, _FIRST, _SIDES_OF_PAIR),
        _Part(_WHOLE, _SECOND, _SIDES_OF_PAIR),
    ),
}


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Drawings at places of one part: numbers, boxes (left, top, side), and their gains.

    A gain is the energy that a drawing explains, as a mean over the canvas.
    """

    drawings: Int[Tensor, " candidates"]
    boxes: Float[Tensor, "candidates 3"]
    gains: Float[Tensor, " candidates"]

    def best(self, count: int) -> _Candidates:
        """Return those of the largest gains, the best first."""
        order = self.gains.topk(min(count, len(self.gains))).indices
        return _Candidates(self.drawings[order], self.boxes[order], self.gains[order])


class SceneJudge:
    """Finds known drawings on pictures.

    Attributes:
        concepts: what it knows, by number.
        styles: words of the styles, by number.
        pixels: side of the pictures that it looks at.
    """

    def __init__(
        self,
        drawings: UInt8[Tensor, "concepts styles 4 side side"],
        concepts: Sequence[Concept],
        styles: Sequence[str],
        pixels: int = SCENE_PIXELS,
    ) -> None:
        """Prepare the drawings, RGBA in 0..255, of a side that is a multiple of FINE."""
        self.concepts = tuple(concepts)
        self.styles = tuple(styles)
        self.pixels = pixels
        flat = drawings.flatten(0, 1)
        self._fine = _reduced(flat, FINE)
        self._middle = _reduced(flat, MIDDLE)
        coarse = _reduced(flat, COARSE).float() / 255
        self._dictionary, self._energy = _dictionary(coarse)

    def look(self, images: Float[Tensor, "items 3 height width"]) -> list[Sight]:
        """Return what each of some pictures in -1..1 shows; JudgeError for what is no picture."""
        check_pictures(images, self.pixels)
        grounds = fit_grounds(images)
        names = grounds.names()
        return [
            self._look_at(image, Grounds(grounds.top[row, None], grounds.bottom[row, None]), name)
            for row, (image, name) in enumerate(zip(images.float(), names, strict=True))
        ]

    @torch.no_grad()
    def _look_at(
        self,
        image: Float[Tensor, "3 height width"],
        ground: Grounds,
        names: tuple[str | None, str | None],
    ) -> Sight:
        """Look at one picture with its ground."""
        heights = torch.linspace(0, 1, self.pixels)[None]
        rest = image - ground.rows(heights)[0, :, :, None]
        # Smaller copies, in which a drawing still has twice the pixels that it is compared in.
        half = functional.avg_pool2d(rest, 2)
        quarter = functional.avg_pool2d(half, 2)
        energy = half.square().sum(dim=0)
        searched = {}
        for relation, parts in _LAYOUTS.items():
            found = [self._search(quarter, energy, ground, part) for part in parts]
            if all(len(each.gains) for each in found):
                searched[relation] = found
        for picture, drawings, side, steps, count, reach in (
            (half, self._middle, MIDDLE, 3, _NUM_MIDDLE, _CLOSE),
            (rest, self._fine, FINE, 1, _NUM_FINE, _VERY_CLOSE),
        ):
            searched = {
                relation: [
                    _refined(picture, ground, each, drawings, part=part, side=side, steps=steps)
                    for each, part in zip(found, _LAYOUTS[relation], strict=True)
                ]
                for relation, found in _closest(searched, reach * float(energy.mean()), count)
            }
        things = []
        for layout, found in _closest(searched, 0.0, _NUM_FINE)[:1]:
            things = [
                self._seen(each, ground, _energy_in(energy, part))
                for each, part in zip(found, _LAYOUTS[layout], strict=True)
            ]
        return _sight([thing for thing in things if thing.likeness >= IS_THERE], names)

    def _search(
        self,
        rest: Float[Tensor, "3 height width"],
        energy: Float[Tensor, "rows columns"],
        ground: Grounds,
        part: _Part,
    ) -> _Candidates:
        """Return the best drawings of all, each where it fits best; none if no box is right."""
        boxes = _boxes_that_hold(energy, part)
        if len(boxes) == 0:
            nothing = torch.zeros(0)
            return _Candidates(nothing.long(), boxes, nothing)
        crops = _crops(rest, boxes, COARSE)
        gains = self._coarse_gains(crops, _ground_rows(ground, boxes, COARSE))
        gains = gains * (boxes[:, 2:] / COARSE) ** 2
        best, where = gains.max(dim=0)
        chosen = best.topk(min(_NUM_COARSE, len(best))).indices
        return _Candidates(chosen, boxes[where[chosen]], best[chosen])

    def _coarse_gains(
        self,
        crops: Float[Tensor, "boxes 3 side side"],
        grounds: Float[Tensor, "boxes 3 side"],
    ) -> Float[Tensor, "boxes drawings"]:
        """Return the energy that every drawing explains in every box.

        A drawing of colours c and opacity a on a ground g leaves the rest T = c a - g a, of which
        crop R has 2 R T - T T: that is linear in what is known of the drawing alone.
        """
        on_ground = (crops * grounds[:, :, :, None]).sum(dim=1)
        rows = [
            2 * crops.flatten(1),
            -2 * on_ground.flatten(1),
            2 * grounds.flatten(1),
            -grounds.square().sum(dim=1),
        ]
        return torch.cat(rows, dim=1) @ self._dictionary - self._energy

    def _seen(self, found: _Candidates, ground: Grounds, energy: float) -> SeenThing:
        """Return the best candidate as a thing, with all that look like it."""
        known = self._fine[found.drawings].float() / 255
        boxes = found.boxes[:1].expand(len(known), -1)
        changes = _changes(known, _ground_rows(ground, boxes, FINE))
        differences = (changes - changes[:1]).square().sum(dim=(1, 2, 3))
        own = float(changes[0].square().sum())
        is_alike = (differences <= ALIKE * own).tolist()
        numbers = [divmod(number, len(self.styles)) for number in found.drawings.tolist()]
        alike = [number for number, same in zip(numbers, is_alike, strict=True) if same]
        concept, style = numbers[0]
        # What it explains beyond its part, where it reaches over the edge, is no merit.
        likeness = min(float(found.gains[0]) / max(energy, 1e-6), 1.0)
        return SeenThing(concept, style, Box(*found.boxes[0].tolist()), likeness, frozenset(alike))


def _closest(
    searched: Mapping[Relation | None, Sequence[_Candidates]], reach: float, count: int
) -> list[tuple[Relation | None, list[_Candidates]]]:
    """Return the layouts that explain the picture best, or less by no more than `reach`.

    Of each part they keep the `count` best drawings, the best first.
    """
    gains = {
        relation: sum(float(each.gains.max()) for each in found)
        for relation, found in searched.items()
    }
    limit = max(gains.values(), default=0.0) - reach
    return [
        (relation, [each.best(count) for each in searched[relation]])
        for relation, gain in gains.items()
        if gain >= limit
    ]


def _refined(
    rest: Float[Tensor, "3 height width"],
    ground: Grounds,
    found: _Candidates,
    drawings: UInt8[Tensor, "drawings 4 side side"],
    *,
    part: _Part,
    side: int,
    steps: int,
) -> _Candidates:
    """Return candidates with boxes that fit better, and what they gain at this resolution."""
    known = drawings[found.drawings].float() / 255
    boxes = found.boxes
    for _ in range(steps):
        boxes = _moved(rest, ground, known, boxes, side)
    gains = _gains(rest, ground, known, boxes, side)
    return _Candidates(found.drawings, boxes, torch.where(_is_in(boxes, part), gains, 0.0))


def _is_in(boxes: Float[Tensor, "boxes 3"], part: _Part) -> Bool[Tensor, " boxes"]:
    """Tell which boxes lie in a part, or reach beyond it by no more than `_STRAYING`."""
    start = boxes[:, :2]
    end = start + boxes[:, 2:]
    low = torch.tensor([part.left[0], part.top[0]]) - _STRAYING
    high = torch.tensor([part.left[1], part.top[1]]) + _STRAYING
    inside: Tensor = ((start >= low) & (end <= high)).all(dim=1)
    return inside


def _sight(things: Sequence[SeenThing], names: tuple[str | None, str | None]) -> Sight:
    """Return a sight: two things lie in the direction in which they are further apart."""
    if len(things) < 2:
        return Sight(tuple(things), None, names)
    one, other = (thing.box for thing in things)
    across = other.left + other.side / 2 - one.left - one.side / 2
    down = other.top + other.side / 2 - one.top - one.side / 2
    relation: Relation = "left of" if abs(across) >= abs(down) else "above"
    is_turned = (across if relation == "left of" else down) < 0
    return Sight(tuple(reversed(things)) if is_turned else tuple(things), relation, names)


def _reduced(
    drawings: UInt8[Tensor, "drawings 4 side side"], side: int
) -> UInt8[Tensor, "drawings 4 smaller smaller"]:
    """Return smaller drawings, their colours premultiplied and in 0..255 for 0..1."""
    parts = []
    for part in drawings.split(_CHUNK):
        levels = part.float()
        premultiplied = torch.cat([levels[:, :3] * levels[:, 3:] / 255, levels[:, 3:]], dim=1)
        reduced = functional.interpolate(
            premultiplied, size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )
        parts.append(reduced.round().to(torch.uint8))
    return torch.cat(parts)


def _dictionary(
    drawings: Float[Tensor, "drawings 4 side side"],
) -> tuple[Float[Tensor, "numbers drawings"], Float[Tensor, " drawings"]]:
    """Return what `_coarse_gains` multiplies with, and the energy of the colours."""
    colours = _colours_in_both_signs(drawings)
    alpha = drawings[:, 3]
    mixed = (colours * alpha[:, None]).sum(dim=3)
    rows = [colours.flatten(1), alpha.flatten(1), mixed.flatten(1), alpha.square().sum(dim=2)]
    return torch.cat(rows, dim=1).T.contiguous(), colours.square().sum(dim=(1, 2, 3))


def _colours_in_both_signs(
    drawings: Float[Tensor, "drawings 4 side side"],
) -> Float[Tensor, "drawings 3 side side"]:
    """Return colours in -1..1 times opacity."""
    return 2 * drawings[:, :3] - drawings[:, 3:]


def _changes(
    drawings: Float[Tensor, "boxes 4 side side"], grounds: Float[Tensor, "boxes 3 side"]
) -> Float[Tensor, "boxes 3 side side"]:
    """Return what drawings add to the grounds they lie on."""
    return _colours_in_both_signs(drawings) - drawings[:, 3:] * grounds[:, :, :, None]


def _energy_in(energy: Float[Tensor, "height width"], part: _Part) -> float:
    """Return the energy in a part of the picture, as a mean over the whole canvas."""
    height, width = energy.shape
    inside = energy[
        round(part.top[0] * height) : round(part.top[1] * height),
        round(part.left[0] * width) : round(part.left[1] * width),
    ]
    return float(inside.sum()) / energy.numel()


def _boxes_that_hold(
    energy: Float[Tensor, "height width"], part: _Part
) -> Float[Tensor, "boxes 3"]:
    """Return the boxes of all sides and places in a part that hold most of its energy."""
    boxes = torch.cat([_boxes_of(side, part) for side in part.sides])
    pixels = energy.shape[0]
    summed = functional.pad(energy.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    top, bottom = (round(limit * pixels) for limit in part.top)
    left, right = (round(limit * pixels) for limit in part.left)

    def inside(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
        return summed[y1, x1] - summed[y0, x1] - summed[y1, x0] + summed[y0, x0]

    whole = inside(*(torch.tensor(number) for number in (left, top, right, bottom)))
    start = (boxes[:, :2] * pixels).round().long()
    end = ((boxes[:, :2] + boxes[:, 2:]) * pixels).round().long()
    limits = (start[:, 0], start[:, 1], end[:, 0], end[:, 1])
    held = inside(
        limits[0].clamp(left, right),
        limits[1].clamp(top, bottom),
        limits[2].clamp(left, right),
        limits[3].clamp(top, bottom),
    )
    return boxes[held >= _HELD * whole]


def _boxes_of(side: float, part: _Part) -> Float[Tensor, "boxes 3"]:
    """Return the boxes of one side in a part, a coarse pixel apart."""
    step = side / COARSE
    columns = _starts(part.left, side, step)
    rows = _starts(part.top, side, step)
    lefts, tops = torch.meshgrid(columns, rows, indexing="ij")
    return torch.stack([lefts.flatten(), tops.flatten(), torch.full((lefts.numel(),), side)], dim=1)


def _starts(limits: tuple[float, float], side: float, step: float) -> Float[Tensor, " starts"]:
    """Return where a box of this side may start between two limits."""
    slack = max(limits[1] - limits[0] - side, 0) + 2 * _OVERHANG * side
    count = int(slack / step) + 1
    middle = (limits[0] + limits[1] - side) / 2
    return middle + (torch.arange(count) - (count - 1) / 2) * step


def _crops(
    rest: Float[Tensor, "3 height width"], boxes: Float[Tensor, "boxes 3"], side: int
) -> Float[Tensor, "boxes 3 side side"]:
    """Return what is in some boxes, as so many pixels; beyond the picture there is nothing."""
    pixels = rest.shape[-1]
    columns = _crop_weights(boxes[:, 0], boxes[:, 2], side, pixels)
    rows = _crop_weights(boxes[:, 1], boxes[:, 2], side, pixels)
    wide = torch.einsum("chw,nsw->ncsh", rest, columns)
    return torch.einsum("ncsh,nrh->ncrs", wide, rows)


def _crop_weights(
    start: Float[Tensor, " boxes"], length: Float[Tensor, " boxes"], side: int, pixels: int
) -> Float[Tensor, "boxes side pixels"]:
    centres = (torch.arange(side) + 0.5) / side
    at = (start[:, None] + centres * length[:, None]) * pixels
    width = (length * pixels / side).clamp(min=1)
    return triangle_weights(at, width, pixels, margin=pixels // side + 1)


def _ground_rows(
    ground: Grounds, boxes: Float[Tensor, "boxes 3"], side: int
) -> Float[Tensor, "boxes 3 side"]:
    """Return the ground's colours along the rows of some boxes."""
    centres = (torch.arange(side) + 0.5) / side
    heights = boxes[:, 1:2] + centres * boxes[:, 2:]
    count = len(boxes)
    several = Grounds(ground.top.expand(count, -1), ground.bottom.expand(count, -1))
    return several.rows(heights.clamp(0, 1))


def _gains(
    rest: Float[Tensor, "3 height width"],
    ground: Grounds,
    drawings: Float[Tensor, "boxes 4 side side"],
    boxes: Float[Tensor, "boxes 3"],
    side: int,
) -> Float[Tensor, " boxes"]:
    """Return the energy that each drawing explains in its box, as a mean over the canvas."""
    crops = _crops(rest, boxes, side)
    changes = _changes(drawings, _ground_rows(ground, boxes, side))
    gained = (2 * crops * changes - changes.square()).sum(dim=(1, 2, 3))
    return gained * (boxes[:, 2] / side) ** 2


def _moved(
    rest: Float[Tensor, "3 height width"],
    ground: Grounds,
    drawings: Float[Tensor, "boxes 4 side side"],
    boxes: Float[Tensor, "boxes 3"],
    side: int,
) -> Float[Tensor, "boxes 3"]:
    """Return the boxes after one Gauss-Newton step towards the least squared difference.

    What a drawing adds to the ground is taken to be linear in small moves of its box, as Lucas and
    Kanade (1981) do.
    """
    changes = _changes(drawings, _ground_rows(ground, boxes, side))
    missing = _crops(rest, boxes, side) - changes
    down, across = torch.gradient(changes, dim=(2, 3))
    centred = torch.arange(side) - (side - 1) / 2
    growth = across * centred + down * centred[:, None]
    # A box that moves to the right moves the drawing with it, against its gradient.
    slopes = -torch.stack([across.flatten(1), down.flatten(1), growth.flatten(1)], dim=2)
    normal = slopes.transpose(1, 2) @ slopes
    damping = 1e-3 * normal.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-6
    normal = normal + damping[:, None, None] * torch.eye(3)
    step = torch.linalg.solve(normal, (slopes.transpose(1, 2) @ missing.flatten(1)[:, :, None]))
    across_step, down_step, growth_step = step[:, :, 0].clamp(-2, 2).unbind(dim=1)
    growth_step = (growth_step * side).clamp(-2, 2) / side
    pixel = boxes[:, 2] / side
    grown = boxes[:, 2] * (1 + growth_step)
    spread = (grown - boxes[:, 2]) / 2
    left = boxes[:, 0] + across_step * pixel - spread
    top = boxes[:, 1] + down_step * pixel - spread
    return torch.stack([left, top, grown], dim=1)
