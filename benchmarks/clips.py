"""Clips of a teacher and its students, measured: motion, concept, motion ratio, distances, seconds.

    python benchmarks/clips.py --model nano-motion --steps 12 --sampler dpmpp-2m --count 18

Every row draws the same prompts from the same noise. True clips of the same prompts are measured
beside them, which is what no model exceeds; clips of the teacher's own from other noise, which is
how near to it students could come; and the teacher in as many evaluations of its network as each
student has, with guidance (half as many steps) and without. `--control` names the folder of a
matched run whose students are measured too. Seconds are those of one processor core, for one clip.

    python benchmarks/clips.py --model nano-motion --base examples/openmoji \
        --judge examples/openmoji/judge.safetensors --steps 12 --sampler dpmpp-2m --out runs/unseen

`--base` puts the motion modules on another picture model than they were trained on, one that needs
no word for its style; there are no true clips then.

Figures are printed as a table and written as JSON, beside the first clips of every row, as a sheet
of strips (PNG) and as one that moves (WebP).
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS, STYLES, Attributes
from twostep.evaluate.clip_scores import AskedClip, ClipReport, score_clips
from twostep.evaluate.judge import BUILT_IN, load_judge
from twostep.evaluate.motions import MOTIONS
from twostep.formats import resolve
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.motion import SETTINGS_FILE, read_settings
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pretrain.captions import open_caption
from twostep.pretrain.clips import ClipLabels, animate, moving_caption, random_paths
from twostep.pretrain.drawings import built_in_concepts, load_drawings

FIRST_SEED = 1_000_000
FRESH = 500_000
"""Added to a seed for other noise."""

SHOWN = 18
"""Clips of a sheet."""

COLUMNS = 6
"""Of the sheet that moves."""


@dataclass(frozen=True)
class Wish:
    """A prompt, what it asks for, and the seed of its noise."""

    prompt: str
    asked: AskedClip
    labels: ClipLabels
    seed: int


@dataclass(frozen=True)
class Row:
    """A model and how it draws; None is what its contract says.

    `is_reference` marks the clips that those after it are compared with, and `fresh` is added to
    all seeds.
    """

    name: str
    bundle: Bundle
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None
    fresh: int = 0
    is_reference: bool = False


def wishes(count: int, *, with_style: bool = True) -> list[Wish]:
    """Return complete prompts with every kind of motion in turn."""
    words = Random(0)
    concepts = built_in_concepts()
    kinds = list(MOTIONS)
    made = []
    for number in range(count):
        concept = words.choice(concepts)
        name = concept.names[0]
        style = words.choice(STYLES)
        background = words.choice(list(BACKGROUNDS))
        named = Attributes((name,), style if with_style else None, background)
        picture = open_caption(named)
        kind = kinds[number % len(kinds)]
        # The usual words, whatever the draw.
        usual = MOTIONS[kind].words[:1]
        prompt = f"{picture}, {usual[0]}" if usual else moving_caption(picture, kind, words)
        labels = ClipLabels(
            concepts.index(concept), STYLES.index(style), list(BACKGROUNDS).index(background), kind
        )
        made.append(Wish(prompt, AskedClip(kind, name), labels, FIRST_SEED + number))
    return made


def on_bases(model: str, bases: Sequence[str], folder: Path) -> str:
    """Write a folder with the same motion modules on other picture models; return its path."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(resolve(model).path, folder)
    settings = read_settings(folder)
    changed = settings.model_copy(update={"bases": tuple(bases)})
    (folder / SETTINGS_FILE).write_text(changed.model_dump_json())
    return str(folder)


def true_clips(asked: Sequence[Wish], num_frames: int, pixels: int) -> Tensor:
    """Return clips in -1..1 that are what the wishes ask for, along random paths."""
    drawings = load_drawings().drawings
    labels = [wish.labels for wish in asked]
    chosen = torch.stack([drawings[each.concept, each.style] for each in labels])
    background = torch.tensor([each.background for each in labels])
    generator = torch.Generator().manual_seed(FIRST_SEED)
    paths = random_paths([each.kind for each in labels], num_frames, generator)
    return animate(chosen, background, paths, pixels=pixels)


def drawn(row: Row, asked: Sequence[Wish]) -> tuple[Tensor, float]:
    """Return clips in -1..1, and the seconds that one takes by itself."""
    bundle = row.bundle
    size = bundle.contract.sizes[0]
    clips = []
    began = time.perf_counter()
    with torch.no_grad():
        for wish in asked:
            guided = encode_prompts(bundle, [wish.prompt], size, scale=row.guidance)
            seeds = [wish.seed + row.fresh]
            latents = sample_prompts(
                bundle, guided, seeds, size, steps=row.steps, sampler=row.sampler
            )
            clips.append(decode(bundle, latents))
    return torch.cat(clips), (time.perf_counter() - began) / len(asked)


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """Yield what is drawn, the teacher first."""
    teacher = load_bundle(options.model)
    own = {"steps": options.steps, "sampler": options.sampler, "guidance": options.guidance}
    yield Row("teacher", teacher, **own, is_reference=True)
    yield Row("teacher, other noise", teacher, **own, fresh=FRESH)
    for evaluations in teacher.students:
        for guidance, steps in ((options.guidance, evaluations // 2), (1.0, evaluations)):
            if steps:
                name = f"teacher, {evaluations} evaluations, "
                name += "unguided" if guidance == 1.0 else "guided"
                yield Row(name, teacher, steps, options.sampler, guidance)
    for kind, folder in (("student", options.model), ("control", options.control)):
        for steps in resolve(folder).students if folder else ():
            yield Row(f"{kind}, {steps} steps", load_bundle(folder, steps=steps))


def save_strips(clips: Tensor, path: Path, count: int = SHOWN) -> None:
    """Write the first clips as a PNG, one in each row."""
    rows = clips[:count].permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    (sheet,) = to_images(rows.permute(2, 0, 1)[None])
    sheet.save(path)


def save_moving(
    clips: Tensor, path: Path, frames_per_second: float, count: int = SHOWN, columns: int = COLUMNS
) -> None:
    """Write the first clips as a WebP in which they move beside each other."""
    columns = min(columns, len(clips))
    shown = clips[: min(count, len(clips) // columns * columns)]
    rows = shown.unflatten(0, (-1, columns)).permute(3, 2, 0, 4, 1, 5)
    first, *others = to_images(rows.flatten(4, 5).flatten(2, 3))
    duration = round(1000 / frames_per_second)
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0, quality=80)


def line(name: str, report: ClipReport, seconds: float | None) -> str:
    """Return a row of the table."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        name,
        cell(report.motion, ".0%"),
        cell(report.concept, ".0%"),
        cell(report.motion_amount, ".4f"),
        cell(report.motion_ratio, ".2f"),
        cell(report.frechet_frames, ".1f"),
        cell(report.frechet_changes, ".2f"),
        cell(seconds, ".2f"),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure a teacher and all of its students."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model of clips, with its students")
    parser.add_argument("--control", help="a folder of students by another recipe")
    parser.add_argument("--base", type=Path, help="another picture model, in the place of its own")
    parser.add_argument("--judge", type=Path, default=BUILT_IN, help="of what pictures show")
    parser.add_argument("--count", type=int, default=36, help="prompts")
    parser.add_argument("--steps", type=int, help="of the teacher")
    parser.add_argument("--sampler", help="of the teacher")
    parser.add_argument("--guidance", type=float, help="of the teacher")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/clips"), help="folder of the results"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.base:
        base = str(options.base.resolve())
        options.model = on_bases(options.model, [base], options.out / "on-base")
    judge = load_judge(options.judge)
    asked = wishes(options.count, with_style=options.base is None)
    wanted = [wish.asked for wish in asked]
    print("| model | motion | concept | amount | ratio | frames | changes | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    figures = {}
    reference = None
    for row in rows_of(options):
        clips, seconds = drawn(row, asked)
        if row.is_reference:
            reference = clips
        if row.is_reference and options.base is None:
            of_truth = true_clips(asked, clips.shape[2], clips.shape[3])
            truth = score_clips(of_truth, wanted, judge, reference=reference)
            print(line("true clips", truth, None), flush=True)
            figures["true clips"] = truth.to_dict()
        compared = None if row.is_reference else reference
        report = score_clips(clips, wanted, judge, reference=compared)
        print(line(row.name, report, seconds), flush=True)
        figures[row.name] = {**report.to_dict(), "seconds": seconds}
        stem = row.name.replace(", ", "-").replace(" ", "-")
        save_strips(clips, options.out / f"{stem}.png")
        save_moving(clips, options.out / f"{stem}.webp", row.bundle.codec.frames_per_second)
        (options.out / "clips.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
