"""The way back from a prompt: what it names of concept, style and background, as `data.captions`
writes them.
"""

import re
from collections.abc import Sequence

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Attributes, Concept


def attributes_from_prompt(prompt: str, concepts: Sequence[Concept]) -> Attributes | None:
    """Read a prompt that `caption` or `complete_caption` wrote; None where it names a thing that is
    no concept.

    A synonym stands for its concept, so the names are those of the concept, the usual one first.
    """
    words = " ".join(prompt.lower().split())
    words, background = _take(words, _BACKGROUND)
    words, style = _take(words, _STYLE)
    noun = re.sub(r"^an? ", "", words)
    if noun in {"", "picture", "drawing", "emoji"}:
        return Attributes((), style, background)
    names = _names_of(noun, concepts)
    return Attributes(names, style, background) if names else None


_BACKGROUND_WORD = "|".join(BACKGROUNDS)
_STYLE_WORD = "|".join(STYLES)
_BACKGROUND = re.compile(
    rf"^({_BACKGROUND_WORD}) background(?:, |$)| on an? ({_BACKGROUND_WORD}) background$"
    rf"|, ({_BACKGROUND_WORD}) background$| on ({_BACKGROUND_WORD})$"
)
_STYLE = re.compile(
    rf"^(?:an? )?({_STYLE_WORD})(?: |$)|, ({_STYLE_WORD})$| in ({_STYLE_WORD}) style$"
)


def _take(words: str, pattern: re.Pattern[str]) -> tuple[str, str | None]:
    """Cut the first match out of the words and return what it names."""
    match = pattern.search(words)
    if match is None:
        return words, None
    return words[: match.start()] + words[match.end() :], next(filter(None, match.groups()))


def _names_of(noun: str, concepts: Sequence[Concept]) -> tuple[str, ...]:
    for concept in concepts:
        if noun in concept.names:
            return concept.names
    return (noun,) if any(concept.subgroup == noun for concept in concepts) else ()
