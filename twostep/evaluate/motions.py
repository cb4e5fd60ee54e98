"""The kinds of motion that clips of the built-in set show, and the words for them."""

from dataclasses import dataclass

from twostep.errors import TwostepError


@dataclass(frozen=True)
class Motion:
    """A kind of motion: what captions call it, and how a drawing changes over a clip.

    All numbers are for the whole clip, whatever its number of frames.

    Attributes:
        words: as captions write them, the usual ones first; none for a clip that stands still.
        right: how far the drawing moves, in shares of the picture's side.
        down: likewise.
        turns: how often it turns clockwise, as it is seen.
        growth: by what its size is multiplied from the first frame to the last.
        hops: how often it jumps up and falls down again, as high as `height`.
        height: of a hop, in shares of the picture's side.
    """

    words: tuple[str, ...]
    right: float = 0.0
    down: float = 0.0
    turns: float = 0.0
    growth: float = 1.0
    hops: int = 0
    height: float = 0.25


MOTIONS: dict[str, Motion] = {
    "still": Motion(()),
    "left": Motion(("moving left", "going left"), right=-0.3),
    "right": Motion(("moving right", "going right"), right=0.3),
    "up": Motion(("moving up", "rising"), down=-0.3),
    "down": Motion(("moving down", "falling"), down=0.3),
    "spin": Motion(("spinning", "turning around"), turns=1.0),
    "bounce": Motion(("bouncing", "jumping"), hops=2),
    "grow": Motion(("growing", "getting larger"), growth=1.8),
    "shrink": Motion(("shrinking", "getting smaller"), growth=1 / 1.8),
}
"""Name of each kind -> what it is."""

MOTION_WORDS = frozenset(
    word for motion in MOTIONS.values() for words in motion.words for word in words.split()
)
"""Every word that says how something moves."""


class MotionNameError(TwostepError):
    """A kind of motion that there is not."""


def find_motion(name: str) -> Motion:
    """Return a kind of motion by its name; MotionNameError lists those there are."""
    if name not in MOTIONS:
        raise MotionNameError(f"the motion {name!r} is none of {', '.join(MOTIONS)}; use one.")
    return MOTIONS[name]
