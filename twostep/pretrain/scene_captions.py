"""Captions of scenes: what a caption says of one, in several forms, and tables of their tokens.

A caption may leave out styles, background or how things lie, may use another word for a thing or
say only what kind of thing it is, or may say nothing at all. `evaluate.scene_prompts` reads all
forms back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Int16
from torch import Tensor
from transformers import CLIPTokenizer

from twostep.evaluate.attributes import (
    BACKGROUNDS,
    STYLES,
    Concept,
    SceneAttributes,
    ThingAttributes,
)
from twostep.pretrain.captions import with_article
from twostep.pretrain.scenes import PlacedThing, Scene, SceneTable

_COLOURS = tuple(BACKGROUNDS)

_BATCH = 4096
"""Captions that are tokenized at once."""


@dataclass(frozen=True)
class SceneOmission:
    """How often a caption of a scene leaves something out, as probabilities in 0..1.

    Attributes:
        everything: the caption is empty.
        styles: the styles are left out.
        background: the background is left out.
        relation: how two things lie is left out.
        synonym: a thing has another name, if there is one.
        kind_instead: it is named by its kind ("a bird"), if it has one.
    """

    everything: float = 0.08
    styles: float = 0.2
    background: float = 0.2
    relation: float = 0.33
    synonym: float = 0.1
    kind_instead: float = 0.1

    def apply(self, scene: Scene, concepts: Sequence[Concept], rng: Random) -> SceneAttributes:
        """Return what is left to be said of a scene."""
        if rng.random() < self.everything:
            return SceneAttributes()
        with_styles = rng.random() >= self.styles
        things = [self._thing(thing, concepts, with_styles, rng) for thing in scene.things]
        relation = None if rng.random() < self.relation else scene.relation
        if relation is None and rng.random() < 0.5:
            things.reverse()
        top, bottom = (_COLOURS[number] for number in scene.background)
        background = None if rng.random() < self.background else (top, bottom)
        return SceneAttributes(tuple(things), relation, background)

    def _thing(
        self, thing: PlacedThing, concepts: Sequence[Concept], with_style: bool, rng: Random
    ) -> ThingAttributes:
        concept = concepts[thing.concept]
        by_kind = rng.random() < self.kind_instead and concept.subgroup != ""
        names = (concept.subgroup,) if by_kind else concept.names
        return ThingAttributes(names, STYLES[thing.style] if with_style else None)


def scene_caption(
    attributes: SceneAttributes, rng: Random, *, synonym: float = SceneOmission.synonym
) -> str:
    """Return one of the ways to say these attributes; no attributes give the empty caption.

    Args:
        attributes: what is said.
        rng: chooses among the ways.
        synonym: how often a thing gets another name than its usual one.
    """
    if attributes == SceneAttributes():
        return ""
    things = list(attributes.things)
    nouns = [_random_name(thing, rng, synonym) for thing in things]
    styles = [thing.style for thing in things]
    common = styles[0] if len(set(styles)) == 1 else None
    style_after = common is not None and rng.random() < 0.5
    if style_after:
        styles = [None] * len(things)
    said = [
        with_article(f"{style} {noun}" if style else noun)
        for style, noun in zip(styles, nouns, strict=True)
    ]
    words = said[0] if len(said) == 1 else _related(said, attributes, rng)
    if style_after:
        words += rng.choice((f", {common}", f" in {common} style"))
    if attributes.background is None:
        return words
    ground = f"{_colours(attributes.background)} background"
    after_comma = words.endswith(f", {common}") or rng.random() < 0.5
    return f"{words}, {ground}" if after_comma else f"{words} on {with_article(ground)}"


def complete_scene_caption(attributes: SceneAttributes) -> str:
    """Return the plain caption of evaluation, which names each thing by its usual name.

    For example "a 3d fox to the left of a flat pizza on a red to yellow background".
    """
    said = [
        with_article(f"{thing.style} {thing.names[0]}" if thing.style else thing.names[0])
        for thing in attributes.things
    ]
    between = {"left of": " to the left of ", "above": " above ", None: " and "}
    words = between[attributes.relation].join(said)
    if attributes.background is None:
        return words
    return f"{words} on {with_article(_colours(attributes.background))} background"


def scene_corpus(concepts: Sequence[Concept]) -> list[str]:
    """Return texts that hold every word a caption of scenes of these concepts can hold."""
    names = [name for concept in concepts for name in concept.names]
    kinds = sorted({concept.subgroup for concept in concepts})
    form = "a an and to the left right of above below on in style background , thing"
    return [*names, *kinds, *STYLES, *BACKGROUNDS, form]


def random_caption(
    scene: Scene, concepts: Sequence[Concept], rng: Random, omission: SceneOmission
) -> str:
    """Return a caption of a scene, which often says less than there is."""
    said = omission.apply(scene, concepts, rng)
    return scene_caption(said, rng, synonym=omission.synonym)


def caption_table(
    table: SceneTable,
    concepts: Sequence[Concept],
    tokenizer: CLIPTokenizer,
    *,
    captions_per_scene: int,
    seed: int,
    omission: SceneOmission | None = None,
) -> Int16[Tensor, "scenes captions tokens"]:
    """Return tokens of several random captions of every scene, as long as the tokenizer allows.

    Args:
        table: of the scenes, on any device.
        concepts: by their numbers in the table.
        tokenizer: of the model.
        captions_per_scene: captions of every scene.
        seed: the same gives the same captions.
        omission: how often captions leave something out; SceneOmission() if not given.
    """
    rng = Random(f"captions/{seed}")
    captions = [
        random_caption(scene, concepts, rng, omission or SceneOmission())
        for scene in table.scenes()
        for _ in range(captions_per_scene)
    ]
    tokens = torch.cat(
        [tokens_of(captions[at : at + _BATCH], tokenizer) for at in range(0, len(captions), _BATCH)]
    )
    by_scene: Tensor = tokens.unflatten(0, (len(table), captions_per_scene))
    return by_scene


def tokens_of(
    captions: Sequence[str], tokenizer: CLIPTokenizer
) -> Int16[Tensor, "captions tokens"]:
    """Return the tokens of captions, all as long as the tokenizer allows."""
    batch = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    tokens: Tensor = batch.input_ids
    return tokens.to(torch.int16)


def _related(said: Sequence[str], attributes: SceneAttributes, rng: Random) -> str:
    """Return two things, said one way or the other around, with how they lie."""
    first, second = said
    turned = rng.random() < 0.5
    if attributes.relation == "left of":
        way = rng.choice(("to the {} of", "{} of"))
        side = "right" if turned else "left"
        between = way.format(side)
    elif attributes.relation == "above":
        between = "below" if turned else "above"
    else:
        between = "and"
    return f"{second} {between} {first}" if turned else f"{first} {between} {second}"


def _colours(background: tuple[str, str]) -> str:
    """Return "red", or "red to yellow" for a gradient that is red at the top."""
    top, bottom = background
    return top if top == bottom else f"{top} to {bottom}"


def _random_name(thing: ThingAttributes, rng: Random, synonym: float) -> str:
    if len(thing.names) > 1 and rng.random() < synonym:
        return rng.choice(thing.names[1:])
    return thing.names[0]
