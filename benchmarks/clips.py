"""Clips of a teacher and its students, measured: motion, concept, motion ratio, Frechet distances.

    python benchmarks/clips.py --model runs/nano-motion-chain/model --count 36

Every model draws the same prompts from the same noise. The teacher is measured beside clips of its
own from other noise, which is how far students could come. Figures are printed as a table and
written as JSON beside the strips of the first clips.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from twostep.evaluate.attributes import BACKGROUNDS, STYLES
from twostep.evaluate.clip_scores import AskedClip, ClipReport, score_clips
from twostep.evaluate.judge import load_judge
from twostep.evaluate.motions import MOTIONS
from twostep.media.image import to_images
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import decode, encode_prompts, sample_prompts
from twostep.pretrain.captions import complete_caption
from twostep.pretrain.clips import moving_caption
from twostep.pretrain.drawings import built_in_concepts

FIRST_SEED = 1_000_000
FRESH = 500_000
"""Added to a seed for other noise."""


@dataclass(frozen=True)
class Wish:
    """A prompt, what it asks for, and the seed of its noise."""

    prompt: str
    asked: AskedClip
    seed: int


def wishes(count: int) -> list[Wish]:
    """Return complete prompts with every kind of motion in turn."""
    words = Random(0)
    concepts = built_in_concepts()
    kinds = list(MOTIONS)
    made = []
    for number in range(count):
        name = words.choice(concepts).names[0]
        picture = complete_caption(name, words.choice(STYLES), words.choice(list(BACKGROUNDS)))
        kind = kinds[number % len(kinds)]
        # The usual words, whatever the draw.
        usual = MOTIONS[kind].words[:1]
        prompt = f"{picture}, {usual[0]}" if usual else moving_caption(picture, kind, words)
        made.append(Wish(prompt, AskedClip(kind, name), FIRST_SEED + number))
    return made


def drawn(bundle: Bundle, asked: list[Wish], *, fresh: int = 0, at_once: int = 4) -> Tensor:
    """Draw clips in -1..1 as a model's contract says."""
    size = bundle.contract.sizes[0]
    clips = []
    with torch.no_grad():
        for start in range(0, len(asked), at_once):
            part = asked[start : start + at_once]
            guided = encode_prompts(bundle, [wish.prompt for wish in part], size)
            seeds = [wish.seed + fresh for wish in part]
            clips.append(decode(bundle, sample_prompts(bundle, guided, seeds, size)))
    return torch.cat(clips)


def save_strips(clips: Tensor, path: Path, count: int = 9) -> None:
    """Write the first clips as a PNG, one in each row."""
    rows = clips[:count].permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    (sheet,) = to_images(rows.permute(2, 0, 1)[None])
    sheet.save(path)


def line(name: str, report: ClipReport) -> str:
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
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure a teacher and all of its students."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder of a model of clips")
    parser.add_argument("--count", type=int, default=36, help="prompts")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/clips"), help="folder of the results"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    judge = load_judge()
    asked = wishes(options.count)
    teacher = load_bundle(options.model)
    reference = drawn(teacher, asked)
    sets = {
        "teacher": (reference, None),
        "teacher, other noise": (drawn(teacher, asked, fresh=FRESH), reference),
    }
    for steps in teacher.students:
        student = load_bundle(options.model, steps=steps)
        sets[f"{steps} steps"] = (drawn(student, asked), reference)
    print("| model | motion | concept | amount | ratio | frames | changes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    figures = {}
    for name, (clips, other) in sets.items():
        report = score_clips(clips, [wish.asked for wish in asked], judge, reference=other)
        print(line(name, report), flush=True)
        figures[name] = report.to_dict()
        save_strips(clips, options.out / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    (options.out / "clips.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
