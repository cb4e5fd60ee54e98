"""The figures of pictures of scenes: what of that which was asked is right.

The rows are GenEval's (arXiv 2310.11513), with styles where it has colours: a single thing, two
things, which style belongs to which thing, how they lie, the ground, and everything together.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import permutations
from typing import Any

from jaxtyping import Float
from torch import Tensor

from twostep.evaluate.attributes import Concept, SceneAttributes, ThingAttributes
from twostep.evaluate.bootstrap import Resamples
from twostep.evaluate.metrics import Score, score
from twostep.evaluate.scene_judge import SceneJudge, SeenThing, Sight


@dataclass(frozen=True)
class SceneVerdict:
    """What of a prompt is right on a picture; None where the prompt does not ask.

    Attributes:
        single: exactly one thing is there, and it is the one that was asked for.
        two: exactly two things are there, both asked for.
        style: every thing whose style is said is there in this style.
        position: both things are there, and lie as is said.
        background: both colours of the ground are those that are said.
    """

    single: bool | None
    two: bool | None
    style: bool | None
    position: bool | None
    background: bool | None

    @property
    def overall(self) -> bool | None:
        """Whether everything that the prompt asks is right; None if it asks nothing."""
        asked = [each for each in vars(self).values() if each is not None]
        return all(asked) if asked else None


@dataclass(frozen=True)
class SceneReport:
    """The shares of pictures on which what was asked is right, 95 % intervals over prompts.

    The fields are those of `SceneVerdict`, and:

    Attributes:
        num_images: pictures in the set.
        num_unknown: those of which it is not known what they were asked to show.
        overall: pictures on which everything that was asked is right.
        kernel_to_reference: kernel distance to other pictures, in the features of the second judge;
            None if it was not asked for.
    """

    num_images: int
    num_unknown: int
    single: Score
    two: Score
    style: Score
    position: Score
    background: Score
    overall: Score
    kernel_to_reference: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, shares included."""
        values = asdict(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Score):
                values[field.name]["share"] = value.share
        return values


ROWS = ("single", "two", "style", "position", "background", "overall")
"""The scores of a report, in order."""


def judge_scene(
    asked: SceneAttributes, sight: Sight, concepts: Sequence[Concept], styles: Sequence[str]
) -> SceneVerdict:
    """Return what of a prompt is right on a picture.

    Things are matched with what was asked so that as much as possible is right. Where known
    drawings look alike on the picture, each of them counts as seen.

    Args:
        asked: what the prompt says.
        sight: what the picture shows.
        concepts: by the numbers in the sight.
        styles: by the numbers in the sight.
    """
    known = [_readings(thing, concepts, styles) for thing in sight.things]
    count = len(asked.things)
    # Whether all things are there, all in their styles, and where they should be, for each way to
    # match them.
    ways = [(False, False, False)]
    if len(known) == count:
        for order in permutations(range(count)):
            pairs = [(asked.things[number], known[place]) for number, place in enumerate(order)]
            are_there = all(_shows(thing, seen) for thing, seen in pairs)
            in_style = all(_shows_in_style(thing, seen) for thing, seen in pairs)
            in_place = asked.relation == sight.relation and order == tuple(range(count))
            ways.append((are_there, in_style, are_there and in_place))
    are_there, in_style, in_place = max(ways)
    names_style = any(thing.style is not None for thing in asked.things)
    return SceneVerdict(
        single=are_there if count == 1 else None,
        two=are_there if count == 2 else None,
        style=in_style if names_style else None,
        position=in_place if asked.relation is not None else None,
        background=sight.background == asked.background if asked.background else None,
    )


def judge_scenes(
    images: Float[Tensor, "items 3 height width"],
    asked: Sequence[SceneAttributes | None],
    judge: SceneJudge,
) -> list[SceneVerdict | None]:
    """Judge pictures in -1..1 against what each was asked to show; None where that is not known."""
    return [
        None if what is None else judge_scene(what, sight, judge.concepts, judge.styles)
        for what, sight in zip(asked, judge.look(images), strict=True)
    ]


def summarise_scenes(
    verdicts: Sequence[SceneVerdict | None],
    prompts: Sequence[Hashable],
    *,
    kernel_to_reference: float | None = None,
) -> SceneReport:
    """Return the figures of verdicts on pictures; those of one prompt are resampled together.

    Args:
        verdicts: None where it is not known what a picture was asked to show.
        prompts: of each picture, or what stands for it.
        kernel_to_reference: is put into the report.
    """
    resamples = Resamples(prompts)
    scores = {}
    for row in ROWS:
        answers = [None if verdict is None else getattr(verdict, row) for verdict in verdicts]
        is_right = [bool(answer) for answer in answers]
        scores[row] = score(is_right, [answer is not None for answer in answers], resamples)
    num_unknown = sum(verdict is None for verdict in verdicts)
    return SceneReport(
        len(verdicts), num_unknown, **scores, kernel_to_reference=kernel_to_reference
    )


def _readings(
    thing: SeenThing, concepts: Sequence[Concept], styles: Sequence[str]
) -> list[tuple[Concept, str]]:
    """Return the concepts and styles that a seen thing can be taken for."""
    return [(concepts[concept], styles[style]) for concept, style in thing.alike]


def _shows(asked: ThingAttributes, seen: Sequence[tuple[Concept, str]]) -> bool:
    return any(asked.names[0] in (*concept.names, concept.subgroup) for concept, _ in seen)


def _shows_in_style(asked: ThingAttributes, seen: Sequence[tuple[Concept, str]]) -> bool:
    return _shows(asked, [each for each in seen if asked.style in (None, each[1])])
