"""The way back from a prompt: what it names of concept, style and background.

It reads the forms that `pretrain.captions` writes.
"""

import re
from collections.abc import Sequence

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Attributes, Concept

_BACKGROUND_WORD = "|".join(BACKGROUNDS)
_STYLE_WORD = "|".join(STYLES)
_BACKGROUND = re.compile(
    rf"^({_BACKGROUND_WORD}) background(?:, |$)| on an? ({_BACKGROUND_WORD}) background$"
    rf"|, ({_BACKGROUND_WORD}) background$| on ({_BACKGROUND_WORD})$"
)
_STYLE = re.compile(
    rf"^(?:an? )?({_STYLE_WORD})(?: |$)|, ({_STYLE_WORD})$| in ({_STYLE_WORD}) style$"
)
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
