"""A style LoRA on a few-step student: put there as it is, and trained on it by `twostep distill
nano-style`.

    twostep pretrain nano-noto --out runs/style              # a LoRA that draws like Noto where no style is named
    twostep cache runs/style/prompts.txt --lora runs/style/noto.safetensors --steps 16 --out runs/style/cache
    twostep distill nano-style --out runs/nano-style         # trains it on, on the 2-step student
    python benchmarks/nano_style.py                          # judges teacher and student with it

The LoRA is trained as users train theirs: on the teacher, by the noise it has to predict, on
pictures of one style.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from nano_table import Sampler, draw, to_float
from nano_tasks import FIRST_SEED, Task, complete_tasks
from torch import Tensor

from examples.contact_sheet import contact_sheet
from twostep.evaluate.attributes import Attributes
from twostep.evaluate.judge import load_judge
from twostep.evaluate.metrics import evaluate
from twostep.media.image import to_images
from twostep.models.loading import load_bundle, load_with_loras
from twostep.pretrain.captions import with_article
from twostep.pretrain.drawings import BUILT_IN as DRAWINGS
from twostep.pretrain.drawings import load_drawings

STYLE = "noto"
LORA = Path("runs/style/noto.safetensors")
RETRAINED = Path("runs/nano-style/model/students/noto_2step_lora.safetensors")
Drawings = Annotated[Path, typer.Option("--drawings", help="Folder of the drawings.")]


def main(
    drawings_path: Drawings = DRAWINGS,
    retrained: Path = RETRAINED,
    count: Annotated[int, typer.Option(help="Prompts, of which none names a style.")] = 256,
) -> None:
    """Judge pictures of prompts that name no style: does it draw in the style, and still the right
    thing.
    """
    emoji, judge = load_drawings(drawings_path), load_judge()
    tasks = [_without_style(task) for task in complete_tasks(emoji.concepts, count)]
    wishes = [replace(task.attributes, style=STYLE) for task in tasks]
    few, many = (
        Sampler("euler", 2, 1.0),
        Sampler("euler", 32, load_bundle("nano").contract.guidance),
    )
    rows = [
        ("teacher, 32 steps", 32, [], many),
        ("teacher with the style, 32 steps", 32, [str(LORA)], many),
        ("student, 2 steps", 2, [], few),
        ("student with the style as it is", 2, [str(LORA)], few),
        ("student with the style trained on it", 2, [str(retrained)], few),
    ]
    pictures: dict[str, Tensor] = {}
    for label, steps, loras, sampler in rows:
        bundle = load_with_loras("nano", loras, steps=steps)
        parts = [draw(bundle, sampler, tasks[start : start + 64]) for start in range(0, count, 64)]
        pictures[label] = to_float(torch.cat(parts))
    typer.echo(
        "| | concept | style | background | distance to the styled teacher |\n|---|---:|---:|---:|---:|"
    )
    reference = judge.statistics(pictures["teacher with the style, 32 steps"])
    for label, *_ in rows:
        report = evaluate(pictures[label], wishes, judge, reference=reference)
        shares = " | ".join(
            f"{100 * (score.share or 0):.1f} %"
            for score in (report.concept, report.style, report.background)
        )
        typer.echo(f"| {label} | {shares} | {report.frechet_to_reference:.2f} |")
    chosen = range(0, count, count // 12)
    lines = [(label, to_images(pictures[label][list(chosen)])) for label, *_ in rows]
    contact_sheet(lines, [tasks[i].prompt for i in chosen], scale=2).save(
        LORA.with_name("sheet.png")
    )


def _without_style(task: Task) -> Task:
    wish = task.attributes
    prompt = f"{with_article(wish.names[0])} on {with_article(f'{wish.background} background')}"
    return Task(prompt, Attributes(wish.names, None, wish.background), task.seed + FIRST_SEED)


if __name__ == "__main__":
    typer.run(main)
