"""Captions of the drawings: words for a picture, often incomplete on purpose.

A caption may leave out the style, the background or both, say only the subgroup ("a bird, 3d"), or
say nothing at all. So one prompt has many right pictures, and a distilled student has modes to keep
or to lose.
"""

from dataclasses import dataclass
from random import Random

from twostep.evaluate.attributes import Attributes


@dataclass(frozen=True)
class Omission:
    """How often a caption leaves something out, as probabilities in 0..1.

    Attributes:
        everything: the caption is empty.
        style: the style is left out.
        background: the background is left out.
        concept: the caption names no thing at all.
        subgroup_instead: it names the subgroup instead of the thing.
    """

    everything: float = 0.1
    style: float = 0.2
    background: float = 0.2
    concept: float = 0.05
    subgroup_instead: float = 0.12

    def apply(
        self, names: tuple[str, ...], subgroup: str, style: str, background: str, rng: Random
    ) -> Attributes:
        """Return what is left to be said of a picture with these attributes."""
        if rng.random() < self.everything:
            return Attributes()
        number = rng.random()
        if number < self.concept:
            names = ()
        elif number < self.concept + self.subgroup_instead:
            names = (subgroup,)
        return Attributes(
            names,
            None if rng.random() < self.style else style,
            None if rng.random() < self.background else background,
        )

    def caption(
        self, names: tuple[str, ...], subgroup: str, style: str, background: str, rng: Random
    ) -> str:
        """Return a caption of a picture with these attributes, which often says less than these."""
        return caption(self.apply(names, subgroup, style, background, rng), rng)


def caption(attributes: Attributes, rng: Random) -> str:
    """Return one of the ways to say these attributes: "a flat red apple on a blue background".

    The usual name of a concept comes up in three of four captions; its synonyms share the rest.
    No attributes at all give the empty caption.
    """
    if attributes == Attributes():
        return ""
    noun = _random_name(attributes.names, rng)
    style = attributes.style
    background = attributes.background
    form = rng.randrange(4)
    if form == 0:
        place = f"on {with_article(background)} background" if background else ""
        return _join(" ", with_article(_join(" ", style, noun)), place)
    if form == 1:
        return _join(", ", with_article(noun), style, background and f"{background} background")
    if form == 2:
        manner = f"in {style} style" if style else ""
        return _join(" ", with_article(noun), manner, background and f"on {background}")
    return _join(", ", background and f"{background} background", _join(" ", style, noun))


def complete_caption(name: str, style: str, background: str) -> str:
    """Return the plain full caption of evaluation: "a 3d red apple on a blue background"."""
    return f"{with_article(f'{style} {name}')} on {with_article(background)} background"


def open_caption(attributes: Attributes) -> str:
    """Return the plain caption of a concept that leaves out what is None: "a 3d red apple"."""
    thing = with_article(_join(" ", attributes.style, attributes.names[0]))
    if attributes.background is None:
        return thing
    return f"{thing} on {with_article(attributes.background)} background"


def with_article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _random_name(names: tuple[str, ...], rng: Random) -> str:
    if not names:
        return rng.choice(("picture", "drawing", "emoji"))
    if len(names) == 1 or rng.random() < 0.75:
        return names[0]
    return rng.choice(names[1:])


def _join(separator: str, *parts: str | None) -> str:
    """Join the parts that say something."""
    return separator.join(part for part in parts if part)
