"""The prompts that the nano models are evaluated with, and held-out seeds for them.

Complete prompts name concept, style and background, so every picture has one right answer. Open
ones name the concept and leave background, style or both out, so there are modes to keep or to
lose. Incomplete ones leave anything out, down to the empty prompt. All follow from the list of
concepts alone: the same concepts give the same prompts everywhere. Seeds start at FIRST_SEED;
training draws its noise from none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.errors import TwostepError
from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Attributes, Concept
from twostep.pretrain.captions import caption, complete_caption, open_caption
from twostep.pretrain.drawings import DrawingSet, Placement, compose
from twostep.pretrain.sizes import NANO

FIRST_SEED = 1_000_000
"""Seeds from here on are held out for evaluation."""

FRESH = 500_000
"""Added to the seed of a task for other noise, which no other task has."""

NUM_COMPLETE = 1024
NUM_SEEDS_PER_OPEN_PROMPT = 2
NUM_DIVERSITY_PROMPTS = 64
NUM_SEEDS_PER_PROMPT = 4


class PromptError(TwostepError):
    """There are too few concepts for the evaluation that was asked for."""


@dataclass(frozen=True)
class Task:
    """One picture to be drawn and judged: the prompt, what it says, and the seed of its noise."""

    prompt: str
    attributes: Attributes
    seed: int


def complete_tasks(concepts: Sequence[Concept], count: int = NUM_COMPLETE) -> list[Task]:
    """Return `count` different complete prompts, one seed each.

    Every concept comes up in every style before any repeats, on changing backgrounds. Raises
    PromptError if so few concepts do not give so many prompts.
    """
    most = len(concepts) * len(STYLES) * len(BACKGROUNDS)
    if not 0 < count <= most:
        raise PromptError(
            f"{count} complete prompts were asked for; {len(concepts)} concepts give 1 to {most}."
        )
    backgrounds = list(BACKGROUNDS)
    # Neighbours in the list are alike (all animals first): an order of long strides spreads a last,
    # incomplete turn over all.
    order = spread(len(concepts))
    tasks = []
    for index in range(count):
        turn, place = divmod(index, len(concepts))
        number = order[place]
        style = STYLES[(number + turn) % len(STYLES)]
        # Every concept meets another background in each style, and others again after all styles.
        shift = 3 * (turn % len(STYLES)) + turn // len(STYLES)
        background = backgrounds[(5 * number + shift) % len(backgrounds)]
        names = concepts[number].names
        prompt = complete_caption(names[0], style, background)
        tasks.append(Task(prompt, Attributes(names, style, background), FIRST_SEED + index))
    return tasks


def open_tasks(concepts: Sequence[Concept], count: int) -> list[Task]:
    """Return `count` tasks whose prompts name a concept and leave background or style open.

    The three ways to leave something out (background, both, style) take turns. Prompts have two
    seeds each, side by side; a prompt that comes up again has other seeds.

    Raises:
        PromptError: there is no concept, or none or more than 400,000 are asked for.
    """
    if not concepts or not 0 < count <= 400_000:
        raise PromptError(
            f"{count} open prompts were asked for, of {len(concepts)} concepts; 1 to 400,000 can "
            "be had of at least one."
        )
    backgrounds = list(BACKGROUNDS)
    order = spread(len(concepts))
    tasks = []
    for index in range(count):
        number_of_prompt = index // NUM_SEEDS_PER_OPEN_PROMPT
        number_of_round, way = divmod(number_of_prompt, 3)
        turn, place = divmod(number_of_round, len(concepts))
        number = order[place]
        style = STYLES[(number + turn) % len(STYLES)] if way == 0 else None
        background = backgrounds[(5 * number + turn) % len(backgrounds)] if way == 2 else None
        attributes = Attributes(concepts[number].names, style, background)
        tasks.append(Task(open_caption(attributes), attributes, FIRST_SEED + 30_000 + index))
    return tasks


def with_fresh_noise(tasks: Sequence[Task]) -> list[Task]:
    """Return the same prompts with other seeds."""
    return [replace(task, seed=task.seed + FRESH) for task in tasks]


def repeated_tasks(concepts: Sequence[Concept]) -> list[Task]:
    """Return 64 complete prompts with 4 seeds each, those of a prompt side by side."""
    tasks = complete_tasks(concepts, NUM_DIVERSITY_PROMPTS)
    return _with_seeds([(task.prompt, task.attributes) for task in tasks], FIRST_SEED + 10_000)


def incomplete_tasks(concepts: Sequence[Concept]) -> list[Task]:
    """Return 64 different incomplete prompts with 4 seeds each, those of a prompt side by side.

    Every combination of what can be left out is there, down to the empty prompt.
    """
    chosen: dict[Attributes, str] = {}
    for round_number in range(64):
        for attributes in _incomplete(concepts, round_number):
            if len(chosen) < NUM_DIVERSITY_PROMPTS and attributes not in chosen:
                chosen[attributes] = caption(attributes, Random(len(chosen)))
    if len(chosen) < NUM_DIVERSITY_PROMPTS:
        raise PromptError(
            f"{len(concepts)} concepts give only {len(chosen)} incomplete prompts; "
            "use more concepts."
        )
    return _with_seeds(
        [(prompt, attributes) for attributes, prompt in chosen.items()], FIRST_SEED + 20_000
    )


def real_pictures(
    attributes: Sequence[Attributes], drawings: DrawingSet, *, seed: int = FIRST_SEED
) -> Float[Tensor, "batch 3 height width"]:
    """Compose one real picture for each item; attributes that are left open are random."""
    generator = torch.Generator().manual_seed(seed)
    rng = Random(seed)
    chosen = [_fitting_drawing(wanted, drawings, rng) for wanted in attributes]
    concept, style = torch.tensor(chosen).T
    names = list(BACKGROUNDS)
    background = torch.tensor(
        [names.index(wanted.background or rng.choice(names)) for wanted in attributes]
    )
    drawn = drawings.drawings[concept, style]
    return compose(drawn, background, Placement(), generator, pixels=NANO.pixels)


def spread(count: int) -> list[int]:
    """Order numbers so that neighbours lie far apart: by the multiples of the golden ratio."""
    return sorted(range(count), key=lambda number: (number * 0.6180339887498949) % 1)


def _with_seeds(prompts: Sequence[tuple[str, Attributes]], first_seed: int) -> list[Task]:
    return [
        Task(prompt, attributes, first_seed + NUM_SEEDS_PER_PROMPT * index + repeat)
        for index, (prompt, attributes) in enumerate(prompts)
        for repeat in range(NUM_SEEDS_PER_PROMPT)
    ]


def _incomplete(concepts: Sequence[Concept], round_number: int) -> Iterator[Attributes]:
    """Yield attributes for each way of leaving something out, other ones in every round."""
    subgroups = list(dict.fromkeys(concept.subgroup for concept in concepts))
    backgrounds = list(BACKGROUNDS)
    order = spread(len(concepts))
    style = STYLES[round_number % len(STYLES)]
    for place, (with_style, with_background) in enumerate(
        ((False, False), (True, False), (False, True), (True, True))
    ):
        step = 4 * round_number + place
        background = backgrounds[(5 * step) % len(backgrounds)] if with_background else None
        manner = style if with_style else None
        subgroup = subgroups[(round_number + 3 * place) % len(subgroups)]
        yield Attributes((subgroup,), manner, background)
        yield Attributes((), manner, background)
        if not (with_style and with_background):
            yield Attributes(concepts[order[step % len(order)]].names, manner, background)


def _fitting_drawing(wanted: Attributes, drawings: DrawingSet, rng: Random) -> tuple[int, int]:
    fitting = [
        number
        for number, concept in enumerate(drawings.concepts)
        if not wanted.names
        or wanted.names[0] in concept.names
        or wanted.names == (concept.subgroup,)
    ]
    if not fitting:
        raise PromptError(
            f"no drawing shows {wanted.names[0]!r}; use the drawings that prompts were made for."
        )
    styles = drawings.styles
    style = styles.index(wanted.style) if wanted.style else rng.randrange(len(styles))
    return rng.choice(fitting), style
