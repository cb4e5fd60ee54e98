"""Weights in prompts: which syntax they have, and the prompt without them.

Two kinds are understood: compel's, as in `red++`, `(red apple)1.3` or
`("a fox", "a dog").blend(0.7, 0.3)`; and A1111's `(red apple:1.3)`.
"""

import re

_A1111 = re.compile(r"\(([^()]+):(\d*\.?\d+)\)")
_COMPEL = re.compile(r'(?<=[\w)"])[+-]+(?!\w)|(?<=\))\d*\.?\d+|\.(and|blend)\([^)]*\)')


def in_compel_syntax(prompt: str) -> str:
    """Return a prompt with A1111's weights written as compel's."""
    return _A1111.sub(r"(\1)\2", prompt)


def has_weights(prompt: str) -> bool:
    """Whether a prompt has weights in compel's syntax."""
    return _COMPEL.search(prompt) is not None


def without_weights(prompt: str) -> str:
    """Return the words of a prompt in compel's syntax; one without weights stays as it is."""
    if not has_weights(prompt):
        return prompt
    return re.sub(r'[()"]', "", _COMPEL.sub("", prompt))
