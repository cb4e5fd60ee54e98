"""What a picture of the built-in set shows: a concept, drawn in a style, on a plain background.

Captions are written from these attributes, prompts are read back into them, and the judge answers
in them.
"""

from dataclasses import dataclass
from typing import Literal

from twostep.errors import TwostepError

STYLES = ("flat", "3d", "noto", "twemoji")
"""Words of the drawing styles, as captions write them."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 58, 58),
    "orange": (240, 140, 50),
    "yellow": (248, 214, 72),
    "green": (78, 168, 88),
    "teal": (38, 150, 150),
    "blue": (58, 108, 220),
    "purple": (130, 78, 190),
    "pink": (246, 162, 192),
    "brown": (130, 86, 56),
    "gray": (142, 142, 146),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
}
"""Name of each background -> its colour, RGB in 0..255."""


Relation = Literal["left of", "above"]
"""How the first of two things in a scene lies to the second."""


class AttributeNameError(TwostepError):
    """A style or a background that the built-in set does not have."""


@dataclass(frozen=True)
class Concept:
    """A thing that is drawn in every style.

    `icon` is its name in the icon sets, `subgroup` what kind of thing it is ("fruit"), `names` are
    the words for it, the usual one first.
    """

    icon: str
    subgroup: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Attributes:
    """What a caption says of a picture; None where it says nothing.

    `names` are the words of a concept, the usual one first, or those of its subgroup.
    """

    names: tuple[str, ...] = ()
    style: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        _check_name("style", self.style, STYLES)
        _check_name("background", self.background, tuple(BACKGROUNDS))


@dataclass(frozen=True)
class Box:
    """A square on the canvas, in shares of its side: left and top edge, and the square's side."""

    left: float
    top: float
    side: float


@dataclass(frozen=True)
class ThingAttributes:
    """What a caption says of one thing in a scene.

    `names` are the words of a concept, the usual one first, or those of its subgroup; `style` is
    None where it is not said.
    """

    names: tuple[str, ...]
    style: str | None = None

    def __post_init__(self) -> None:
        """Refuse unknown styles; AttributeNameError."""
        _check_name("style", self.style, STYLES)


@dataclass(frozen=True)
class SceneAttributes:
    """What a caption says of a scene.

    Attributes:
        things: none, one or two. If their relation is said, the left or the upper one is the first.
        relation: how the first lies to the second; None if it is not said ("and").
        background: the colours of BACKGROUNDS at the top and at the bottom, equal on a plain
            ground; None if it is not said.
    """

    things: tuple[ThingAttributes, ...] = ()
    relation: Relation | None = None
    background: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        """Refuse unknown colours; AttributeNameError."""
        for colour in self.background or ():
            _check_name("background", colour, tuple(BACKGROUNDS))


def _check_name(kind: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise AttributeNameError(f"the {kind} '{value}' is none of {', '.join(known)}; use one.")
