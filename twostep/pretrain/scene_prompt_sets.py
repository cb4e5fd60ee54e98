"""The prompts that mini is evaluated with, and held-out seeds for them.

Half of them name one thing, the others two; all name styles and ground, and two of three pairs how
they lie. Every concept comes up before any repeats. Each prompt is that of a scene, so there is a
real picture of it too. All follow from the list of concepts alone: the same concepts give the same
prompts everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from twostep.evaluate.attributes import (
    BACKGROUNDS,
    STYLES,
    Concept,
    SceneAttributes,
    ThingAttributes,
)
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.prompt_sets import FIRST_SEED, PromptError, spread
from twostep.pretrain.scene_captions import complete_scene_caption
from twostep.pretrain.scenes import Scene, compose, random_scenes, table_of

NUM_SCENES = 1024

_SEED_OF_SCENES = FIRST_SEED
"""No training draws its scenes from this seed."""

_MOST = 400_000
"""More would take seeds from other tasks."""

_BATCH = 32


@dataclass(frozen=True)
class SceneTask:
    """One picture of a scene to be drawn and judged.

    Attributes:
        prompt: names everything but, in a third of the pairs, how the things lie.
        attributes: what the prompt says.
        scene: one that it is true of.
        seed: of the picture's noise.
    """

    prompt: str
    attributes: SceneAttributes
    scene: Scene
    seed: int


def scene_tasks(concepts: Sequence[Concept], count: int = NUM_SCENES) -> list[SceneTask]:
    """Return `count` scenes of these concepts with complete prompts, one seed each.

    Raises:
        PromptError: there are fewer than two concepts, or none or more than 400,000 are asked for.
    """
    if len(concepts) < 2 or not 0 < count <= _MOST:
        raise PromptError(
            f"{count} scenes were asked for, of {len(concepts)} concepts; 1 to {_MOST} can be had "
            "of at least two."
        )
    table = random_scenes(len(concepts), len(STYLES), count=count, seed=_SEED_OF_SCENES)
    order = spread(len(concepts))
    num_things = 0
    num_pairs = 0
    tasks = []
    for index, drawn in enumerate(table.scenes()):
        things = []
        for thing in drawn.things:
            things.append(replace(thing, concept=order[num_things % len(order)]))
            num_things += 1
        scene = replace(drawn, things=tuple(things))
        num_pairs += scene.relation is not None
        attributes = _attributes(scene, concepts, with_relation=num_pairs % 3 != 0)
        prompt = complete_scene_caption(attributes)
        tasks.append(SceneTask(prompt, attributes, scene, FIRST_SEED + index))
    return tasks


def real_scenes(
    tasks: Sequence[SceneTask], drawings: DrawingSet, *, pixels: int
) -> Float[Tensor, "tasks 3 pixels pixels"]:
    """Compose the real picture of every task, in -1..1."""
    table = table_of([task.scene for task in tasks])
    batches = [
        compose(table.rows(slice(start, start + _BATCH)), drawings.drawings, pixels)
        for start in range(0, len(tasks), _BATCH)
    ]
    return torch.cat(batches)


def _attributes(
    scene: Scene, concepts: Sequence[Concept], *, with_relation: bool
) -> SceneAttributes:
    """Return all there is to say of a scene, with or without how the things lie."""
    names = list(BACKGROUNDS)
    top, bottom = scene.background
    things = tuple(
        ThingAttributes(concepts[thing.concept].names, STYLES[thing.style])
        for thing in scene.things
    )
    relation = scene.relation if with_relation else None
    return SceneAttributes(things, relation, (names[top], names[bottom]))
