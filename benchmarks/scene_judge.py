"""How often the scene judge is right on real scenes, and how often it is taken in.

    python benchmarks/scene_judge.py --count 1024 --out runs/scene-judge.json

Real scenes of the prompts that mini is evaluated with, composed from the drawings at places, sizes
and on grounds that the prompts' seed draws. Half of them are mildly damaged (blur, noise,
brightness, contrast), and half are as a small autoencoder leaves them (a little softer, with soft
noise). Each is judged against its own prompt, for the share that is rightly called right, and
against prompts that are wrong in one respect, for the share that is wrongly called right: another
thing, another style, things that changed places, another ground. Noise and bare grounds should show
nothing at all.

    python benchmarks/scene_judge.py --autoencoder examples/mini --out runs/mini-vae-judged.json

The same scenes, encoded and decoded instead of damaged: a model on the latents of this autoencoder
cannot do better than it. The peak signal-to-noise ratio of its pictures is printed too.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Concept, SceneAttributes
from twostep.evaluate.scene_judge import ALIKE, SCENE_PIXELS, SceneJudge, Sight
from twostep.evaluate.scene_scores import ROWS, SceneReport, judge_scene, summarise_scenes
from twostep.files import write_atomically
from twostep.media.image import ImageCodec
from twostep.media.patches import psnr
from twostep.models.sdxl_networks import load_codec
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
    parser.add_argument("--autoencoder", type=Path, help="folder that holds `vae`; no damage then")
    arguments = parser.parse_args()
    damages = _DAMAGES
    reconstruction = None
    if arguments.autoencoder:
        reconstruction = Reconstruction(load_codec(arguments.autoencoder))
        damages = {"reconstruction": reconstruction}
    drawings = load_rendered(load_vectors(), SCENE_PIXELS)
    judge = load_scene_judge()
    tasks = scene_tasks(drawings.concepts, arguments.count)
    sights, seconds = look(tasks, drawings, judge, damages)
    figures = {
        **report(tasks, sights, judge, damages),
        "seconds_per_picture": seconds / len(tasks),
        "things_seen_where_there_are_none": count_unreadable(judge),
        "drawings_with_a_look_alike": count_look_alikes(drawings),
    }
    if reconstruction:
        figures["psnr"] = mean(reconstruction.psnr)
        print(f"psnr: {figures['psnr']:.2f} dB, the mean over pictures")
    with write_atomically(arguments.out) as file:
        file.write(json.dumps(figures, indent=1).encode())
    for name in ("seconds_per_picture", "things_seen_where_there_are_none"):
        print(f"{name}: {figures[name]}")
    print(f"drawings with a look-alike, on gray: {figures['drawings_with_a_look_alike']}")


class Reconstruction:
    """What an autoencoder makes of pictures, and how near that is to them."""

    def __init__(self, codec: ImageCodec) -> None:
        """Take the autoencoder."""
        self.codec = codec
        self.psnr: list[float] = []

    def __call__(self, pictures: Tensor, generator: torch.Generator) -> Tensor:
        """Return the decoded pictures in -1..1; nothing of them is random."""
        with torch.no_grad():
            made = self.codec.decode(self.codec.encode(pictures)).clamp(-1, 1)
        self.psnr += [psnr(a, b).item() for a, b in zip(made, pictures, strict=True)]
        return made


def look(
    tasks: Sequence[SceneTask],
    drawings: DrawingSet,
    judge: SceneJudge,
    damages: Mapping[str, Damage],
) -> tuple[list[Sight], float]:
    """Look at the damaged real pictures of tasks; return the seconds of the processor too."""
    sights = []
    seconds = 0.0
    for start in range(0, len(tasks), _BATCH):
        part = tasks[start : start + _BATCH]
        generator = torch.Generator().manual_seed(part[0].seed)
        pictures = real_scenes(part, drawings, pixels=SCENE_PIXELS)
        for number, damage in enumerate(damages.values()):
            chosen = slice(number, None, len(damages))
            pictures[chosen] = damage(pictures[chosen], generator)
        began = time.process_time()
        sights += judge.look(pictures)
        seconds += time.process_time() - began
    return sights, seconds


def report(
    tasks: Sequence[SceneTask],
    sights: Sequence[Sight],
    judge: SceneJudge,
    damages: Mapping[str, Damage],
) -> dict[str, object]:
    """Return the figures of all pictures, and of each kind of damage if there are several."""
    asked = {"real": [task.attributes for task in tasks], **_wrong_prompts(tasks, judge)}
    parts = {"all": slice(None)}
    if len(damages) > 1:
        parts |= {name: slice(number, None, len(damages)) for number, name in enumerate(damages)}
    figures: dict[str, object] = {"missed": _missed(tasks, sights, judge)}
    for name, part in parts.items():
        reports = {
            kind: _report(prompts[part], sights[part], judge) for kind, prompts in asked.items()
        }
        figures[name] = {kind: each.to_dict() for kind, each in reports.items()}
        _print(name, reports)
    return figures


def _mild(pictures: Tensor, generator: torch.Generator) -> Tensor:
    return degrade(pictures, MILD, generator)[0]


def _as_decoded(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by 0.8 of a pixel, and add soft noise whose grains are two pixels wide."""
    softened = blur(pictures, torch.full((len(pictures),), 0.8))
    noise = torch.randn(len(pictures), 3, 128, 128, generator=generator)
    noise = functional.interpolate(noise, size=pictures.shape[-2:], mode="bilinear")
    return (softened + 0.05 * noise).clamp(-1, 1)


_DAMAGES: dict[str, Damage] = {
    "mild damage": _mild,
    "as decoded": _as_decoded,
}


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


def count_unreadable(judge: SceneJudge) -> int:
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


def count_look_alikes(drawings: DrawingSet) -> int:
    """Return how many drawings cannot be told from another one in the same box, on gray."""
    parts = []
    for part in drawings.drawings.flatten(0, 1).split(_BATCH):
        levels = functional.avg_pool2d(part.float() / 255, SCENE_PIXELS // 32)
        # Averages of colours that are not premultiplied are a little off at edges.
        parts.append(((2 * levels[:, :3] - 1) * levels[:, 3:]).flatten(1))
    changes = torch.cat(parts)
    energy = changes.square().sum(dim=1)
    count = 0
    for rows in torch.arange(len(changes)).split(256):
        apart = energy[rows, None] + energy - 2 * changes[rows] @ changes.T
        apart[torch.arange(len(rows)), rows] = torch.inf
        count += int((apart.min(dim=1).values < ALIKE * energy[rows]).sum())
    return count


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
