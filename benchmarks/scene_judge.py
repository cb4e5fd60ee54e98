"""How often the scene judge is right on real scenes, and how often it is taken in.

    python benchmarks/scene_judge.py --count 1024 --out runs/scene-judge.json

Real scenes of the prompts that mini is evaluated with, composed from the drawings at places, sizes
and on grounds that the prompts' seed draws: as they are, blurred, noisy, with other brightness and
contrast, and as a small autoencoder would leave them (halved, rounded and enlarged again, with
soft noise). Each is judged against its own prompt, for the share that is rightly called right, and
against prompts that are wrong in one respect, for the share that is wrongly called right: another
thing, another style, things that changed places, another ground. Noise and bare grounds should show
nothing at all.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Concept, SceneAttributes
from twostep.evaluate.scene_judge import SCENE_PIXELS, SceneJudge, Sight
from twostep.evaluate.scene_scores import ROWS, SceneReport, judge_scene, summarise_scenes
from twostep.files import write_atomically
from twostep.pretrain.degradation import Degradation, blur, degrade
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.scene_judging import load_scene_judge
from twostep.pretrain.scene_prompt_sets import NUM_SCENES, SceneTask, real_scenes, scene_tasks
from twostep.pretrain.vectors import load_rendered, load_vectors

MILD = Degradation(
    probability=0.7,
    largest_blur_pixels=1.5,
    largest_noise=0.08,
    largest_contrast_change=0.04,
    largest_brightness_shift=0.03,
)
"""Blur, noise, and brightness and contrast that hardly show."""

_BATCH = 16

Damage = Callable[[Tensor, torch.Generator], Tensor]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=NUM_SCENES, help="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/scene-judge.json"))
    arguments = parser.parse_args()
    drawings = load_rendered(load_vectors(), SCENE_PIXELS)
    judge = load_scene_judge()
    tasks = scene_tasks(drawings.concepts, arguments.count)
    asked = {"real": [task.attributes for task in tasks], **_wrong_prompts(tasks, judge)}
    figures: dict[str, object] = {}
    for name, damage in _DAMAGES.items():
        sights, seconds = _look(tasks, drawings, judge, damage)
        figures[name] = {
            "seconds_per_picture": seconds,
            **{kind: _report(prompts, sights, judge).to_dict() for kind, prompts in asked.items()},
            "missed": _missed(tasks, sights, judge),
        }
        _print(name, {kind: _report(prompts, sights, judge) for kind, prompts in asked.items()})
        with write_atomically(arguments.out) as file:
            file.write(json.dumps(figures, indent=1).encode())
    nothing = _unreadable(judge)
    figures["things_seen_where_there_are_none"] = nothing
    print(f"things seen on pictures that show none: {nothing}")
    with write_atomically(arguments.out) as file:
        file.write(json.dumps(figures, indent=1).encode())


def _as_it_is(pictures: Tensor, generator: torch.Generator) -> Tensor:
    return pictures


def _mild(pictures: Tensor, generator: torch.Generator) -> Tensor:
    return degrade(pictures, MILD, generator)[0]


def _as_decoded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a pixel, and add soft noise of two pixels' width, about 32 dB below the signal."""
    softened = blur(pictures, torch.full((len(pictures),), 0.8))
    noise = torch.randn(len(pictures), 3, 128, 128, generator=generator)
    noise = functional.interpolate(noise, size=pictures.shape[-2:], mode="bilinear")
    return (softened + 0.05 * noise).clamp(-1, 1)


_DAMAGES: dict[str, Damage] = {
    "as composed": _as_it_is,
    "mild damage": _mild,
    "as decoded": _as_decoded,
}


def _look(
    tasks: Sequence[SceneTask], drawings: DrawingSet, judge: SceneJudge, damage: Damage
) -> tuple[list[Sight], float]:
    """Look at the damaged real pictures of all tasks; return the time per picture too."""
    generator = torch.Generator().manual_seed(0)
    sights = []
    seconds = 0.0
    for start in range(0, len(tasks), _BATCH):
        pictures = real_scenes(tasks[start : start + _BATCH], drawings, pixels=SCENE_PIXELS)
        pictures = damage(pictures, generator)
        began = time.process_time()
        sights += judge.look(pictures)
        seconds += time.process_time() - began
    return sights, seconds / len(tasks)


def _wrong_prompts(
    tasks: Sequence[SceneTask], judge: SceneJudge
) -> dict[str, list[SceneAttributes | None]]:
    """Return prompts that are wrong in one respect, None where a task cannot be."""
    return {
        "another thing": [_other_thing(task, judge.concepts) for task in tasks],
        "another style": [_other_style(task) for task in tasks],
        "places changed": [_turned(task) for task in tasks],
        "another ground": [_other_ground(task) for task in tasks],
    }


def _other_thing(task: SceneTask, concepts: Sequence[Concept]) -> SceneAttributes:
    """Ask for the concept that comes next in the list, which is often alike, instead of the first.

    The list is in the order of the alphabet, so "cat face" follows "cat".
    """
    number = (task.scene.things[0].concept + 1) % len(concepts)
    first, *others = task.attributes.things
    first = replace(first, names=concepts[number].names)
    return replace(task.attributes, things=(first, *others))


def _other_style(task: SceneTask) -> SceneAttributes:
    first, *others = task.attributes.things
    style = STYLES[(STYLES.index(first.style or "") + 1) % len(STYLES)]
    return replace(task.attributes, things=(replace(first, style=style), *others))


def _turned(task: SceneTask) -> SceneAttributes | None:
    if task.attributes.relation is None:
        return None
    return replace(task.attributes, things=task.attributes.things[::-1])


def _other_ground(task: SceneTask) -> SceneAttributes:
    names = list(BACKGROUNDS)
    top, bottom = task.attributes.background or ("", "")
    other = names[(names.index(top) + 1) % len(names)]
    return replace(task.attributes, background=(other, other if top == bottom else bottom))


def _report(
    asked: Sequence[SceneAttributes | None], sights: Sequence[Sight], judge: SceneJudge
) -> SceneReport:
    verdicts = [
        None if what is None else judge_scene(what, sight, judge.concepts, judge.styles)
        for what, sight in zip(asked, sights, strict=True)
    ]
    return summarise_scenes(verdicts, range(len(asked)))


def _missed(
    tasks: Sequence[SceneTask], sights: Sequence[Sight], judge: SceneJudge
) -> list[dict[str, str]]:
    """Return the prompts that were judged wrong, with what was seen."""
    missed = []
    for task, sight in zip(tasks, sights, strict=True):
        if judge_scene(task.attributes, sight, judge.concepts, judge.styles).overall:
            continue
        seen = [
            f"{judge.styles[thing.style]} {judge.concepts[thing.concept].names[0]} "
            f"({thing.likeness:.2f})"
            for thing in sight.things
        ]
        words = f"{', '.join(seen)}; {sight.relation}; {sight.background}"
        missed.append({"asked": task.prompt, "seen": words})
    return missed


def _unreadable(judge: SceneJudge) -> int:
    """Return how many things are seen on noise, fine and coarse, and on bare grounds."""
    generator = torch.Generator().manual_seed(0)
    things = 0
    for side in (4, 8, 16, 32, 64, 256):
        noise = torch.randn(4, 3, side, side, generator=generator)
        noise = functional.interpolate(noise, size=(SCENE_PIXELS, SCENE_PIXELS), mode="bilinear")
        things += sum(len(sight.things) for sight in judge.look(noise.clamp(-1, 1)))
    bare = torch.rand(12, 3, 1, 1, generator=generator) * 2 - 1
    grounds = bare.expand(-1, -1, SCENE_PIXELS, SCENE_PIXELS)
    grain = 0.02 * torch.randn(grounds.shape, generator=generator)
    return things + sum(len(sight.things) for sight in judge.look((grounds + grain).clamp(-1, 1)))


def _print(name: str, reports: dict[str, SceneReport]) -> None:
    table = Table(title=name)
    table.add_column("prompts")
    for row in ROWS:
        table.add_column(row, justify="right")
    for kind, report in reports.items():
        shares = [getattr(report, row).share for row in ROWS]
        table.add_row(kind, *("" if share is None else f"{100 * share:.1f}" for share in shares))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
