"""How the foreground of clips moves: its place, size and turning, frame by frame.

The background is one colour, that of the frame's edge, as in the built-in set. What differs from it
is the foreground; its centre and its spread are first and second moments, and its turning is the
shift that makes two frames most alike in polar coordinates around the centre. No network takes
part, so the measures are the same on every machine; docs/video.md says how often they are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from twostep.errors import TwostepError
from twostep.evaluate.motions import MOTIONS

_BACKGROUND_DISTANCE = 0.16
"""Colours at most so far from the edge's are background; -1..1, root of the mean square."""

_FOREGROUND_DISTANCE = 0.4
"""Colours at least so far from it are foreground; between the two, in part."""

_LEAST_SHARE = 0.005
"""Of a frame: what has less foreground shows nothing."""

_ANGLES = 72
_RADII = 12
_LARGEST_TURN = math.radians(60)
"""Between two frames; further, drawings with several alike sides look the same."""

_LEAST_MOTION = 0.4
"""Share of the usual motion of its kind that a clip must show, or it counts as still."""

Clips = Float[Tensor, "clips 3 frames height width"]


class TrackingError(TwostepError):
    """Clips in which nothing can be tracked."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """Where the foreground of clips is, frame by frame.

    Attributes:
        centre: (right, down) from the middle, in shares of the side.
        size: root of the mean squared distance from the centre, in shares of the side.
        turn: clockwise as it is seen, from each frame to the next, in radians.
        share: of the frame that is foreground.
    """

    centre: Float[Tensor, "clips frames 2"]
    size: Float[Tensor, "clips frames"]
    turn: Float[Tensor, "clips steps"]
    share: Float[Tensor, "clips frames"]

    def of(self, clip: int) -> Tracks:
        """Return the tracks of one clip."""
        one = slice(clip, clip + 1)
        return Tracks(self.centre[one], self.size[one], self.turn[one], self.share[one])


@dataclass(frozen=True, eq=False)
class MotionFigures:
    """What the tracks of clips come to, over all frames of each.

    Attributes:
        right: how far the foreground moved, in shares of the side, along the straight line that
            fits its path best.
        down: likewise.
        turns: clockwise, in full turns.
        growth: logarithm of the factor between its first and its last size.
        bounce: how far it strays up and down from that straight line: the standard deviation, in
            shares of the side.
    """

    right: Float[Tensor, " clips"]
    down: Float[Tensor, " clips"]
    turns: Float[Tensor, " clips"]
    growth: Float[Tensor, " clips"]
    bounce: Float[Tensor, " clips"]


def track(clips: Clips) -> Tracks:
    """Find the foreground in every frame of clips in -1..1.

    A frame without any has its centre in the middle, and size and share 0. Raises TrackingError for
    clips of one frame, and for what is no clip.
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 2:
        raise TrackingError(
            "motion is tracked in clips [clips, 3, frames, height, width] of at least two frames; "
            f"got {list(clips.shape)}."
        )
    num_frames = clips.shape[2]
    frames = clips.float().transpose(1, 2).flatten(0, 1)
    mask = foreground(frames)
    share = mask.mean(dim=(1, 2))
    total = mask.sum(dim=(1, 2)).clamp(min=1e-6)
    height, width = mask.shape[-2:]
    down = (torch.arange(height, device=mask.device) + 0.5) / height - 0.5
    right = (torch.arange(width, device=mask.device) + 0.5) / width - 0.5
    centre_right = (mask.sum(dim=1) * right).sum(dim=1) / total
    centre_down = (mask.sum(dim=2) * down).sum(dim=1) / total
    from_centre = (right[None, None] - centre_right[:, None, None]) ** 2
    from_centre = from_centre + (down[None, :, None] - centre_down[:, None, None]) ** 2
    size = ((mask * from_centre).sum(dim=(1, 2)) / total).sqrt()
    centre = torch.stack([centre_right, centre_down], dim=1)
    is_shown = share >= _LEAST_SHARE
    centre = torch.where(is_shown[:, None], centre, torch.zeros_like(centre))
    size = torch.where(is_shown, size, torch.zeros_like(size))
    around = _around(frames, mask, centre, size).unflatten(0, (-1, num_frames))
    return Tracks(
        centre=centre.unflatten(0, (-1, num_frames)),
        size=size.unflatten(0, (-1, num_frames)),
        turn=_turns(around),
        share=share.unflatten(0, (-1, num_frames)),
    )


def foreground(
    frames: Float[Tensor, "frames 3 height width"],
) -> Float[Tensor, "frames height width"]:
    """Return how much of every pixel is foreground, 0..1.

    The colour of the background is the median along the edge of each frame.
    """
    edges = [frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]]
    background = torch.cat(edges, dim=-1).median(dim=-1).values
    distance = (frames - background[:, :, None, None]).square().mean(dim=1).sqrt()
    span = _FOREGROUND_DISTANCE - _BACKGROUND_DISTANCE
    return ((distance - _BACKGROUND_DISTANCE) / span).clamp(0, 1)


def motion_figures(tracks: Tracks) -> MotionFigures:
    """Sum the tracks of clips up."""
    right, _ = _line(tracks.centre[..., 0])
    down, off_line = _line(tracks.centre[..., 1])
    growth, _ = _line(tracks.size.clamp(min=1e-3).log())
    return MotionFigures(
        right=right,
        down=down,
        turns=tracks.turn.sum(dim=1) / (2 * math.pi),
        growth=growth,
        bounce=off_line.square().mean(dim=1).sqrt(),
    )


def motion_kinds(figures: MotionFigures) -> list[str]:
    """Return the kind of motion that each clip shows, by its name in `MOTIONS`.

    It is that of which the clip has the largest share of the usual amount; less than two fifths of
    that is "still".
    """
    usual_height = MOTIONS["bounce"].height
    amounts = {
        "left": figures.right / MOTIONS["left"].right,
        "right": figures.right / MOTIONS["right"].right,
        "up": figures.down / MOTIONS["up"].down,
        "down": figures.down / MOTIONS["down"].down,
        "grow": figures.growth / math.log(MOTIONS["grow"].growth),
        "shrink": figures.growth / math.log(MOTIONS["shrink"].growth),
        "spin": figures.turns.abs() / MOTIONS["spin"].turns,
        # |sin| strays 0.308 of its height from its mean.
        "bounce": figures.bounce / (0.308 * usual_height),
    }
    names = list(amounts)
    table = torch.stack([amounts[name] for name in names], dim=1)
    largest, place = table.max(dim=1)
    kinds = zip(largest.tolist(), place.tolist(), strict=True)
    return [names[which] if amount >= _LEAST_MOTION else "still" for amount, which in kinds]


def aligned(
    clips: Clips, tracks: Tracks, *, size: float, angle: float = 0.0
) -> Float[Tensor, "frames 3 height width"]:
    """Return all frames with their foreground in the middle, in one size, as pictures show it.

    Args:
        clips: in -1..1.
        tracks: as `track` finds them.
        size: of the foreground, as `Tracks.size` measures it; it is enlarged or reduced to that
            by a factor of 4 at most.
        angle: in radians; everything is turned by so much, too.
    """
    frames = clips.float().transpose(1, 2).flatten(0, 1)
    centre = 2 * tracks.centre.flatten(0, 1)
    found = tracks.size.flatten()
    scale = torch.where(found > 0, (found / size).clamp(0.25, 4), torch.ones_like(found))
    across = torch.stack([scale * math.cos(angle), -scale * math.sin(angle), centre[:, 0]], dim=1)
    along = torch.stack([scale * math.sin(angle), scale * math.cos(angle), centre[:, 1]], dim=1)
    theta = torch.stack([across, along], dim=1)
    grid = affine_grid(theta, list(frames.shape), align_corners=False)
    return grid_sample(frames, grid, align_corners=False, padding_mode="border")


def motion_amount(clips: Clips) -> Float[Tensor, " clips"]:
    """Return the mean absolute change from frame to frame, of clips in -1..1."""
    changes = (clips[:, :, 1:] - clips[:, :, :-1]).abs()
    return changes.float().mean(dim=(1, 2, 3, 4))


def motion_ratio(student: Clips, teacher: Float[Tensor, "others 3 _ _ _"]) -> float:
    """Return how much a student's clips move beside its teacher's; 1 is as much.

    Clips of few steps move too little before anything else is wrong with them. Raises TrackingError
    if the teacher's do not move at all.
    """
    by_teacher = float(motion_amount(teacher).mean())
    if by_teacher == 0:
        raise TrackingError("the teacher's clips stand still, so there is no ratio to them.")
    return float(motion_amount(student).mean()) / by_teacher


def agreement(shown: Sequence[str], asked: Sequence[str]) -> float:
    """Return the share of clips that show the kind of motion that was asked for."""
    if not asked or len(shown) != len(asked):
        raise TrackingError(
            f"{len(shown)} clips cannot be compared with {len(asked)} kinds of motion."
        )
    return sum(a == b for a, b in zip(shown, asked, strict=True)) / len(asked)


def _line(values: Float[Tensor, "clips frames"]) -> tuple[Tensor, Tensor]:
    """Return how far the best straight line rises over all frames, and what strays from it."""
    num_frames = values.shape[1]
    time = torch.linspace(-0.5, 0.5, num_frames, device=values.device)
    centred = values - values.mean(dim=1, keepdim=True)
    slope = (centred * time).sum(dim=1) / time.square().sum()
    return slope, centred - slope[:, None] * time


def _around(frames: Tensor, mask: Tensor, centre: Tensor, size: Tensor) -> Tensor:
    """Return the foreground in polar coordinates around its centre [frames, 4, radii, angles]."""
    device = frames.device
    angles = 2 * math.pi * torch.arange(_ANGLES, device=device) / _ANGLES
    # Out to where nearly all of the foreground is; rings of equal width.
    radii = (torch.arange(_RADII, device=device) + 0.5) / _RADII * 1.8
    ring = size[:, None, None] * radii[None, :, None]
    places = torch.stack([ring * angles.cos(), ring * angles.sin()], dim=-1)
    grid = 2 * (places + centre[:, None, None])
    shown = torch.cat([frames * mask[:, None], mask[:, None]], dim=1)
    sampled = grid_sample(shown, grid, align_corners=False)
    # What lies further out has more pixels.
    weighted = sampled * radii.sqrt()[None, None, :, None]
    ring_means = weighted.mean(dim=-1, keepdim=True)
    return weighted - ring_means


def _turns(around: Float[Tensor, "clips frames 4 radii angles"]) -> Float[Tensor, "clips steps"]:
    """Return the turn from each frame to the next that makes the two most alike, in radians."""
    spectrum = torch.fft.rfft(around, dim=-1)
    product = spectrum[:, 1:] * spectrum[:, :-1].conj()
    likeness = torch.fft.irfft(product.sum(dim=(2, 3)), n=_ANGLES, dim=-1)
    step = 2 * math.pi / _ANGLES
    most = round(_LARGEST_TURN / step)
    shifts = torch.arange(-most, most + 1, device=around.device)
    near = likeness[..., shifts % _ANGLES]
    best = near.argmax(dim=-1)
    # The top of the parabola through the best and its neighbours.
    inside = best.clamp(1, 2 * most - 1)
    before, at, after = (
        near.gather(-1, (inside + offset)[..., None])[..., 0] for offset in (-1, 0, 1)
    )
    bend = before - 2 * at + after
    shift = torch.where(bend < 0, 0.5 * (before - after) / bend, torch.zeros_like(bend))
    shift = torch.where(best == inside, shift.clamp(-0.5, 0.5), torch.zeros_like(shift))
    turns: Tensor = (shifts[best] + shift) * step
    return torch.where(near.amax(dim=-1) > 0, turns, torch.zeros_like(turns))
