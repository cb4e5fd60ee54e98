"""The way back from a prompt: what it names of concept, style and background.

It reads the forms that `pretrain.captions` and, for scenes, `pretrain.scene_captions` write.
"""

import re
from collections.abc import Sequence

from twostep.evaluate.attributes import (
    BACKGROUNDS,
    STYLES,
    Attributes,
    Concept,
    Relation,
    SceneAttributes,
    ThingAttributes,
)

_BACKGROUND_WORD = "|".join(BACKGROUNDS)
_STYLE_WORD = "|".join(STYLES)
_BACKGROUND = re.compile(
    rf"^({_BACKGROUND_WORD}) background(?:, |$)| on an? ({_BACKGROUND_WORD}) background$"
    rf"|, ({_BACKGROUND_WORD}) background$| on ({_BACKGROUND_WORD})$"
)
_STYLE = re.compile(
    rf"^(?:an? )?({_STYLE_WORD})(?: |$)|, ({_STYLE_WORD})$| in ({_STYLE_WORD}) style$"
)
_GROUND = re.compile(
    rf"(?:,| on an?) ({_BACKGROUND_WORD})(?: to ({_BACKGROUND_WORD}))? background$"
)
_COMMON_STYLE = re.compile(rf", ({_STYLE_WORD})$| in ({_STYLE_WORD}) style$")
_BETWEEN: dict[str, tuple[Relation | None, bool]] = {
    " to the left of ": ("left of", False),
    " left of ": ("left of", False),
    " to the right of ": ("left of", True),
    " right of ": ("left of", True),
    " above ": ("above", False),
    " below ": ("above", True),
    " and ": (None, False),
}
"""Words between two things: what they say, and whether the second thing is the left or upper one.
"""

_NO_CONCEPT = {"", "picture", "drawing", "emoji"}
"""Nouns that name no thing."""


def attributes_from_prompt(prompt: str, concepts: Sequence[Concept]) -> Attributes | None:
    """Read a prompt; None if it names a thing that is none of the concepts.

    A synonym stands for its concept, so the names returned are those of the concept, the usual one
    first.
    """
    words = " ".join(prompt.lower().split())
    words, background = _cut_out(words, _BACKGROUND)
    words, style = _cut_out(words, _STYLE)
    noun = re.sub(r"^an? ", "", words)
    if noun in _NO_CONCEPT:
        return Attributes((), style, background)
    names = _names_of(noun, concepts)
    return Attributes(names, style, background) if names else None


class ScenePromptReader:
    """Reads what prompts say of scenes of some concepts."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        """Remember the names of the concepts, and the words for their kinds."""
        kinds = {concept.subgroup for concept in concepts} - {""}
        self._names: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in kinds}
        self._names.update({name: each.names for each in concepts for name in each.names})

    def read(self, prompt: str) -> SceneAttributes | None:
        """Read a prompt; None if it says something that is no scene of the concepts.

        A synonym stands for its concept, so the names returned are those of the concept, the usual
        one first.
        """
        words = " ".join(prompt.lower().split())
        if not words:
            return SceneAttributes()
        background = None
        ground = _GROUND.search(words)
        if ground is not None:
            top, bottom = ground.groups()
            background = (top, bottom or top)
            words = words[: ground.start()]
        words, style = _cut_out(words, _COMMON_STYLE)
        things = self._things(words, style)
        if things is None:
            return None
        return SceneAttributes(things[0], things[1], background)

    def _things(
        self, words: str, style: str | None
    ) -> tuple[tuple[ThingAttributes, ...], Relation | None] | None:
        """Read one thing or two, of a common style if there is one."""
        alone = self._thing(words, style)
        if alone is not None:
            return (alone,), None
        # Names hold words like "and" too, so every place where such a word stands is tried.
        for between, (relation, is_turned) in _BETWEEN.items():
            for match in re.finditer(f"(?={between})", words):
                first = self._thing(words[: match.start()], style)
                second = self._thing(words[match.start() + len(between) :], style)
                if first is not None and second is not None:
                    return ((second, first) if is_turned else (first, second)), relation
        return None

    def _thing(self, words: str, style: str | None) -> ThingAttributes | None:
        noun = re.sub(r"^an? ", "", words)
        if noun in self._names:
            return ThingAttributes(self._names[noun], style)
        own_style, _, noun = noun.partition(" ")
        if style is None and own_style in STYLES and noun in self._names:
            return ThingAttributes(self._names[noun], own_style)
        return None


def _cut_out(words: str, pattern: re.Pattern[str]) -> tuple[str, str | None]:
    """Cut the first match out of the words and return what it names."""
    match = pattern.search(words)
    if match is None:
        return words, None
    return words[: match.start()] + words[match.end() :], next(filter(None, match.groups()))


def _names_of(noun: str, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Return the names of the concept or the subgroup that a noun names; empty for neither."""
    for concept in concepts:
        if noun in concept.names:
            return concept.names
    if any(concept.subgroup == noun for concept in concepts):
        return (noun,)
    return ()
