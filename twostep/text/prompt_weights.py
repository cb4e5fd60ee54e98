"""Weights in prompts: a prompt as fragments of text, each with its weight.

Understood are A1111's `(red apple:1.3)`, `(red)` (1.1), `((red))`, `[red]` (1 / 1.1), nested and
with `\\(` for a parenthesis that is meant; `BREAK`, after which a new chunk begins; and compel's
`red++`, `red-` and `(red apple)1.3`. compel's `("a fox", "a dog").blend(0.7, 0.3)` and `.and()` are
left to compel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from twostep.errors import TwostepError

LOUDER = 1.1
"""The weight of one pair of parentheses, and of one plus."""

SOFTER = 0.9
"""The weight of one minus, as compel has it; a pair of brackets is 1 / LOUDER, as A1111 has it."""

MOST = 1000.0
"""The largest weight: far above any use, and far below what overflows."""

_CONJUNCTION = re.compile(r"\)\.(and|blend)\([^)]*\)")
"""What makes a prompt of several in compel's syntax."""

_COMPOSABLE = re.compile(r"\S\s+AND\s+\S")
"""A1111's sum of several prompts, each guided by itself."""

_COLON_WEIGHT = re.compile(r"\(([^()]+):(\d*\.?\d+)\)")

_TOKEN = re.compile(
    r"(?P<escaped>\\[()\[\]\\])"
    r"|(?P<open>[(\[])"
    r"|(?P<weight>:\s*[+-]?(\d+\.?\d*|\.\d+)\s*(?=\)))"
    r"|(?P<close>[)\]])(?P<suffix>\d*\.?\d+|[+-]+(?!\w))?"
    r'|"(?P<quoted>[^"]*)"(?P<quoted_signs>[+-]+)(?!\w)'
    r"|(?P<word>\w+)(?P<signs>[+-]+)(?!\w)"
    r"|(?P<break>\bBREAK\b)"
    r"|(?P<text>\w+|.)",
    re.DOTALL,
)
"""A piece of a prompt; every character belongs to one."""

_CLOSING = {"(": ")", "[": "]"}


class PromptError(TwostepError):
    """Weights in a prompt that cannot be read."""


@dataclass(frozen=True)
class Fragment:
    """A piece of a prompt, and how much it counts: 1 is as the encoder makes it."""

    text: str
    weight: float = 1.0


@dataclass
class _Group:
    """What stands between an opening parenthesis or bracket and here."""

    opening: str
    fragments: list[Fragment] = field(default_factory=list)
    weight: float | None = None


def is_conjunction(prompt: str) -> bool:
    """Whether a prompt mixes several, in compel's syntax."""
    return _CONJUNCTION.search(prompt) is not None


def is_composable(prompt: str) -> bool:
    """Whether a prompt is a sum of prompts as A1111 writes it; one all in capitals is none."""
    return _COMPOSABLE.search(prompt) is not None and prompt != prompt.upper()


def in_compel_syntax(prompt: str) -> str:
    """Return a conjunction with A1111's weights in it written as compel's."""
    return _COLON_WEIGHT.sub(r"(\1)\2", prompt)


@lru_cache(maxsize=256)
def parse_prompt(prompt: str) -> tuple[tuple[Fragment, ...], ...]:
    """Return the fragments of a prompt, of each part between `BREAK`s.

    Neighbours of equal weight are one fragment. Raises PromptError for parentheses that are never
    closed, weights of nothing, and A1111's `[a:b:0.5]` and `[a|b]`, which change a prompt while it
    is drawn.
    """
    parts: list[list[Fragment]] = [[]]
    groups: list[_Group] = []

    def add(text: str, weight: float = 1.0) -> None:
        fragments = groups[-1].fragments if groups else parts[-1]
        fragments.append(Fragment(text, weight))

    for token in _TOKEN.finditer(prompt):
        if token["escaped"]:
            add(token[0][1])
        elif token["open"]:
            groups.append(_Group(token[0]))
        elif token["weight"] and groups and groups[-1].opening == "(":
            groups[-1].weight = _number(prompt, token[0][1:])
        elif token["close"]:
            if groups and _CLOSING[groups[-1].opening] == token["close"]:
                for fragment in _closed(prompt, groups.pop(), token["suffix"]):
                    add(fragment.text, fragment.weight)
            elif token["suffix"]:
                raise _unweighable(prompt, f"{token[0]} closes nothing")
            else:
                add(token[0])
        elif token["quoted_signs"]:
            if not token["quoted"].strip():
                raise _unweighable(prompt, f"{token[0]} weighs nothing")
            add(token["quoted"], _of_signs(token["quoted_signs"]))
        elif token["signs"]:
            add(token["word"], _of_signs(token["signs"]))
        elif token["break"] and not groups:
            parts.append([])
        elif token["break"]:
            raise _unweighable(prompt, "BREAK stands within parentheses")
        else:
            add(token[0])
    if groups:
        raise _unweighable(
            prompt,
            f"{groups[-1].opening} is never closed; write \\{groups[-1].opening} for the sign",
        )
    return tuple(_joined(part) for part in parts)


def has_weights(prompt: str) -> bool:
    """Whether a prompt is more than text: weights, `BREAK`, or several prompts in one."""
    if is_conjunction(prompt):
        return True
    parts = parse_prompt(prompt)
    return len(parts) > 1 or any(fragment.weight != 1 for part in parts for fragment in part)


def without_weights(prompt: str) -> str:
    """Return the words of a prompt alone; one without weights stays as it is, but for escapes."""
    if is_conjunction(prompt):
        signs = re.compile(r'(?<=[\w)"])[+-]+(?!\w)|(?<=\))\d*\.?\d+')
        return re.sub(r'[()"]', "", signs.sub("", _CONJUNCTION.sub("", prompt)))
    parts = parse_prompt(prompt)
    return " ".join("".join(fragment.text for fragment in part) for part in parts)


def _closed(prompt: str, group: _Group, suffix: str | None) -> list[Fragment]:
    """Return the fragments of a group, weighted as it says."""
    text = "".join(fragment.text for fragment in group.fragments)
    if group.opening == "[":
        if "|" in text or re.search(r":\s*\d*\.?\d+\s*$", text):
            raise _unweighable(
                prompt,
                f"[{text}] would change the prompt while it is drawn, which is not done here",
            )
        weight = 1 / LOUDER
    else:
        weight = LOUDER if group.weight is None else group.weight
    if suffix:
        # compel's weight stands in the place of A1111's.
        weight = _of_signs(suffix) if suffix[0] in "+-" else _number(prompt, suffix)
    if not text.strip() and (suffix or group.weight is not None):
        raise _unweighable(prompt, "a weight of nothing")
    return [Fragment(each.text, each.weight * weight) for each in group.fragments]


def _joined(fragments: list[Fragment]) -> tuple[Fragment, ...]:
    """Join neighbours of equal weight; what is only space has the weight before it."""
    texts: list[list[str]] = []
    weights: list[float] = []
    for fragment in fragments:
        if weights and (weights[-1] == fragment.weight or not fragment.text.strip()):
            texts[-1].append(fragment.text)
        else:
            texts.append([fragment.text])
            weights.append(fragment.weight)
    return tuple(
        Fragment("".join(text), weight) for text, weight in zip(texts, weights, strict=True)
    )


def _of_signs(signs: str) -> float:
    louder = LOUDER ** signs.count("+")
    return float(louder * SOFTER ** signs.count("-"))


def _number(prompt: str, text: str) -> float:
    weight = float(text)
    if weight < 0:
        raise _unweighable(prompt, f"{weight:g} is below 0")
    if weight > MOST:
        raise _unweighable(prompt, f"{weight:g} is beyond {MOST:g}, where nothing is drawn")
    return weight


def _unweighable(prompt: str, problem: str) -> PromptError:
    shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    return PromptError(
        f"cannot weigh {shown!r}: {problem}. Write (red apple:1.3), (red apple)1.3, red++ or [red]."
    )
